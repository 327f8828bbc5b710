"""Everything that is wrong with somebody's data, a row each: raised with the sample's id, or dropped and named."""

from __future__ import annotations

import dataclasses
import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from saisa_jax.config import ConfigError, SourceConfig, StageConfig
from saisa_jax.data.pipeline import StageData
from saisa_jax.data.sample import DataError
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.testing.configs import tiny_config

GOOD = 5
SIZE = 16


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def bomb() -> bytes:
    """A file of a hundred bytes that says that it has 60,000 x 60,000 pixels."""
    data = bytearray(encoded(Image.new("1", (1, 1))))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
ROTATED = Image.Exif()
ROTATED[0x0112] = 6
ASK, ANSWER = ("human", "what is it?"), ("gpt", "red")
QUESTION = [ASK, ANSWER]


def write(root: Path, turns: list[tuple[str, str]], image: str | None, data: bytes | None) -> SourceConfig:
    """Good samples and "bad", the third of them."""
    (root / "images").mkdir()
    (root / "images" / "good.png").write_bytes(encoded(Image.new("RGB", (8, 8), "red")))
    if data is not None:
        (root / "images" / "its.img").write_bytes(data)
    good = [{"role": "human", "text": "is it red?"}, {"role": "gpt", "text": "yes"}]
    samples = [_record(f"good{i}", [(t["role"], t["text"]) for t in good], "good.png") for i in range(GOOD)]
    samples.insert(2, _record("bad", turns, image))
    (root / "data.json").write_text(json.dumps(samples))
    return SourceConfig("llava", path=str(root / "data.json"), images=str(root / "images"))


def _record(name: str, turns: list[tuple[str, str]], image: str | None) -> dict[str, Any]:
    record: dict[str, Any] = {"id": name, "conversations": [{"from": role, "value": text} for role, text in turns]}
    return record if image is None else {**record, "image": image}


def epoch(source: SourceConfig, packing: bool, **data: Any) -> tuple[dict[str, np.ndarray], list[str]]:
    """The rows of one epoch by the sample of each, and what was dropped while they were read."""
    config = tiny_config()
    vision = dataclasses.replace(config.model.vision, image_size=SIZE, patch_size=8)
    stage = StageConfig(sources=(source,), batch_size=2, text_length=64)
    data = {"packing": packing, "turns_per_sample": None, "max_drop": 1.0, **data}
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vision=vision),
        data=dataclasses.replace(config.data, **data),
        finetune=stage,
    )
    batches = StageData(config, "finetune", load_tokenizer("easy_vqa")).batches()
    pictures: dict[str, np.ndarray] = {}
    dropped: list[str] = []
    for _ in range((GOOD + 1) // 2):
        host = next(batches)
        dropped += host.dropped
        assert host.num_samples == sum(map(len, host.sample_ids)) - len(host.dropped)
        for row, names in enumerate(host.sample_ids):
            lost = [name for name in names if any(name in line for line in dropped)]
            assert len(lost) < len(names) or not host.batch["loss_weights"][row].any()
            pictures |= {name: host.batch["images"][row, 0] for name in names if name not in lost}
    return pictures, dropped


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    ("turns", "image", "data", "message"),
    [
        pytest.param(QUESTION, "none.png", None, "there is no image", id="missing file"),
        pytest.param(QUESTION, "its.img", encoded(NOISE, "JPEG")[:900], "cannot read", id="truncated JPEG"),
        pytest.param(QUESTION, "its.img", b"", "cannot read", id="0 bytes"),
        pytest.param(QUESTION, "its.img", bomb(), "too large to decode", id="decompression bomb"),
        pytest.param(QUESTION, "../good.png", None, "is not a path within", id="a path with .."),
        pytest.param(QUESTION, "/etc/hostname", None, "is not a path within", id="an absolute path"),
        pytest.param([("robot", "hi"), ANSWER], None, None, "is an unknown role", id="unknown role"),
        pytest.param([ASK, ANSWER, ANSWER], None, None, "two turns of the assistant", id="two assistant turns"),
        pytest.param([ASK, ("gpt", "<image> red")], "good.png", None, "in an answer", id="<image> in an answer"),
        pytest.param([ASK], None, None, "no token is supervised", id="no answer"),
    ],
)
def test_a_bad_sample(tmp_path, turns, image, data, message, packing) -> None:
    source = write(tmp_path, turns, image, data)
    with pytest.raises(DataError, match=rf"'bad'.*{message}"):
        epoch(source, packing, on_error="raise")
    pictures, dropped = epoch(source, packing, on_error="drop")
    assert {name for name in pictures if name.startswith("good")} == {f"good{i}" for i in range(GOOD)}
    assert "bad" not in pictures
    # With packing, texts are checked when they are counted, and a sample without a row is dropped then.
    if dropped or not packing:
        assert all("'bad'" in line and message in line for line in dropped) and dropped


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    ("turns", "image"),
    [
        ([ASK, ("gpt", " ")], None),
        ([ASK, ANSWER, ASK, ("gpt", "")], "good.png"),
        ([("human", "<image>"), ("gpt", "")], "good.png"),
    ],
)
def test_an_empty_answer_stops_no_run(tmp_path, turns, image, packing, caplog) -> None:
    """LLaVA's own 665k holds some."""
    source = write(tmp_path, turns, image, None)
    for policy in ("raise", "drop"):
        caplog.clear()
        with caplog.at_level("WARNING", "absl"):
            pictures, dropped = epoch(source, packing, on_error=policy)
        assert {name for name in pictures if name.startswith("good")} == {f"good{i}" for i in range(GOOD)}
        assert "bad" not in pictures
        told = caplog.text if packing else " ".join(dropped)
        assert "sample 'bad'" in told and ("is an empty answer" in told or "nothing is said" in told)


@pytest.mark.parametrize(
    ("data", "corner"),
    [
        pytest.param(encoded(Image.new("P", (8, 8), 1), transparency=0), None, id="palette"),
        pytest.param(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), (255, 0, 0), id="CMYK"),
        pytest.param(encoded(Image.fromarray(np.full((8, 8), 64, np.uint16))), (64, 64, 64), id="16 bits"),
        pytest.param(
            encoded(Image.new("RGB", (8, 8), "blue"), "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8))]),
            (0, 0, 255),
            id="animated",
        ),
        pytest.param(encoded(Image.new("RGB", (8, 8), "red"), "JPEG", exif=ROTATED), (255, 0, 0), id="EXIF-rotated"),
    ],
)
def test_an_odd_image_is_read(tmp_path, data, corner) -> None:
    pictures, dropped = epoch(write(tmp_path, QUESTION, "its.img", data), packing=False)
    assert not dropped and "bad" in pictures
    if corner is not None:
        assert np.abs(pictures["bad"].astype(int) - corner).max() <= 2


@pytest.mark.parametrize("packing", [False, True])
def test_emoji_and_other_scripts(tmp_path, packing) -> None:
    turns = [("human", "🙂 日本語 हिन्दी עברית \u200d ?"), ("gpt", "红色 🇯🇵")]
    pictures, dropped = epoch(write(tmp_path, turns, "good.png", None), packing)
    assert not dropped and "bad" in pictures


def test_a_million_tokens(tmp_path) -> None:
    source = write(tmp_path, [("human", "is it red?"), ("gpt", "red " * 1_000_000)], "good.png", None)
    assert "bad" in epoch(source, False, on_long="truncate")[0]
    assert "bad" not in epoch(source, False, on_long="drop")[0]
    with pytest.raises(DataError, match=r"sample 'bad': 10\d{5} text tokens do not fit a row of 64"):
        epoch(source, False, on_long="raise")


def test_a_file_that_is_cut(tmp_path) -> None:
    source = write(tmp_path, QUESTION, None, None)
    text = json.dumps(json.loads(Path(source.path).read_text()), indent=1)
    Path(source.path).write_text(text[: text.index('"bad"')])
    for policy in ("raise", "drop"):  # a file is no sample: what follows it would be lost unseen
        with pytest.raises(DataError, match=r"data.json, line 31, byte \d+: the file is cut"):
            epoch(source, False, on_error=policy)
    with pytest.raises(DataError, match=r"nowhere.json' cannot be read: No such file"):
        epoch(dataclasses.replace(source, path="nowhere.json"), False, on_error="drop")


def test_weights_that_sum_to_nothing() -> None:
    source = SourceConfig("easy_vqa", weight=0)
    with pytest.raises(ConfigError, match=r"sources: weights \[0, 0\] sum to nothing"):
        StageConfig(sources=(source, source))
