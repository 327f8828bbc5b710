"""`bench data`: the same pixels on both sides, and a table of them."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from saisa_jax import __main__ as main
from saisa_jax.bench import data
from saisa_jax.cli import bench_data
from saisa_jax.config import Config, ConfigError, ModelConfig, VisionConfig
from saisa_jax.data.images import load_image, prepare_image
from saisa_jax.data.text.tokenizer import load_tokenizer

VISION = VisionConfig(image_size=56)


def test_the_peer_does_the_same_work() -> None:
    tokenizer = load_tokenizer("easy_vqa")
    for picture in data.photographs(2):
        image = load_image(picture)
        assert sorted(image.size) == [480, 640] and 50_000 < len(picture) < 250_000
        ours = prepare_image(image, VISION.image_size, VISION.image_mode, VISION.image_mean)
        same, llava = (data.Peer(VISION, tokenizer, normalised=n)._pixels(picture)[0] for n in (False, True))
        np.testing.assert_array_equal(same.transpose(1, 2, 0), ours)
        values = (ours / 255 - np.array(VISION.image_mean)) / np.array(VISION.image_std)
        np.testing.assert_allclose(llava.transpose(1, 2, 0), values, atol=1e-5)


def test_rounds() -> None:
    samples = data.make_samples(data.photographs(2), words=12)
    assert len({turn.text for sample in samples for turn in sample.turns}) == 4
    rounds = data.bench(Config(model=ModelConfig(vision=VISION)), load_tokenizer("easy_vqa"), samples, repeat=2)
    assert len(rounds) == 2
    for one in rounds:
        assert tuple(one.stages) == data.STAGES and min(one.stages.values()) > 0
        assert 0 < one.ours == sum(one.stages.values())
        assert one.same > 0 and one.llava > 0


def test_what_four_chips_need() -> None:
    """Half of 4 x 197 TFLOP/s over the FLOPs of a sample."""
    table = data.demand_table(276, 100.0, "v5e", 0.5)
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["saisa, pretrain", "saisa, finetune", "llava, pretrain", "llava, finetune"]
    assert columns[1] == ["32", "276", "32", "276"]
    for row in range(4):
        text, flops, samples, tokens, delivered, times = (float(column[row].replace(",", "")) for column in columns[1:])
        assert samples == pytest.approx(394 / flops, rel=0.02)
        assert tokens == pytest.approx(samples * (text + 576), rel=0.01)
        assert delivered == pytest.approx(1600 * (text + 576))
        assert times == pytest.approx(1600 / samples, rel=0.05)


def test_the_command(tmp_path, capsys) -> None:
    for number in range(2):
        Image.new("RGB", (40, 30), "red").save(tmp_path / f"{number}.jpg")
    assert (
        main.main(["bench", "data", "--size=56", f"--images={tmp_path}", "--limit=3", "--repeat=1", "--words=5"]) == 0
    )
    out = capsys.readouterr().out
    assert "3 images of" in out and "to 56 x 56" in out
    assert re.search(r"peer, uint8 .*\d+\.\d\d", out) and "saisa, finetune" in out


def test_what_cannot_be_measured(tmp_path, capsys) -> None:
    for option in ("--limit=0", "--repeat=0", "--words=0", "--mfu=0", "--mfu=1.5"):
        with pytest.raises(ConfigError, match=option):
            bench_data.main([option])
    with pytest.raises(ConfigError, match=r"holds no files"):
        bench_data.main([f"--images={tmp_path}"])
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    assert main.main(["bench", "data", f"--images={tmp_path}", "--limit=1"]) == 2
    assert "bench data: sample 'bench/0': cannot read" in capsys.readouterr().err
    assert main.main(["bench", "data", "--size=2"]) == 2


def test_an_unknown_bench(capsys) -> None:
    assert main.main(["bench", "imge"]) == 2
    assert "did you mean bench image?" in capsys.readouterr().err
