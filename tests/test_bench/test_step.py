"""`bench step`: the step that is timed is stage 2's own, and a ratio is one of times of the same round."""

from __future__ import annotations

import argparse

import pytest

from saisa_jax import __main__ as main
from saisa_jax.bench import step
from saisa_jax.cli import bench_step
from saisa_jax.config import ALIGNMENTS, TRAIN_ALL_BUT_VISION, ConfigError

SMALL = ["--layers=1", "--embed=64", "--mlp=64", "--vocab=128", "--visual=4", "--text=8", "--rows=8"]


def test_what_is_timed() -> None:
    options = argparse.Namespace(
        layers=2, embed=256, mlp=512, vocab=512, visual=16, images=2, text=12, rows=3, dtype="bfloat16", attention="xla"
    )
    for alignment in ALIGNMENTS:
        config = step.make_config(alignment, options)
        model, stage = config.model_for("finetune"), config.finetune
        assert model.alignment == alignment and stage.groups == TRAIN_ALL_BUT_VISION
        assert model.vision.num_patches == 16 and model.vision.embed_dim == 64 and model.num_heads == 4
        assert model.per_layer_projectors == (alignment == "saisa")
        batch = step.make_rows(config)
        assert batch["tokens"].shape == (3, 12) and (batch["segment_ids"] == 1).all()  # no padding
        assert batch["image_segment_ids"].shape == (3, 2) and (batch["image_segment_ids"] == 1).all()
        assert batch["positions"].max() == model.max_length - 1


def test_ratios_are_of_the_same_round() -> None:
    quiet, loud = [1.0, 2.0], [4.0, 8.0]
    timed = {
        "saisa": step.Timed(2e9, [1.0, 4.0, 2.0], quiet + loud[:1]),
        "naavit": step.Timed(3e9, [3.0, 6.0, 3.0], quiet + loud[:1]),
        "llava": step.Timed(4e9, [4.0, 8.0, 4.0], quiet + loud[:1]),
    }
    columns = [list(column.cells) for column in step.table(timed).columns]
    assert columns[1] == ["2,000", "0.50", "0.38 to 0.50", "2,000", "1.00", "2", "0.50", "1"]
    assert columns[3][:3] == ["4,000", "1.00", "1.00 to 1.00"]


def test_the_command(capsys) -> None:
    assert main.main(["bench", "step", *SMALL, "--repeat=2"]) == 0
    out = capsys.readouterr().out
    assert "8 row(s) of 1 x 4 visual and 8 text tokens, 1 layers x 64, float32, on 8 x cpu" in out
    assert "ms a step" in out and "of LLaVA's" in out and "Load of the machine" in out


@pytest.mark.parametrize(
    "option", ["--layers=0", "--repeat=0", "--embed=100", "--embed=0", "--visual=5", "--visual=0", "--text=0"]
)
def test_what_cannot_be_measured(option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        bench_step.main([option])
