"""The parts of the page on their own: the choice of examples, smoothing, units, overlays."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from saisa_jax import flops
from saisa_jax.report import attention, pictures, units
from saisa_jax.report.examples import choose, choose_for_attention, is_right
from saisa_jax.report.page import changed
from saisa_jax.report.plots import alignment_like, smooth
from saisa_jax.testing.configs import tiny_config


def predictions(count: int, wrong: int) -> list[dict[str, object]]:
    kinds = ("color", "shape", "yes/no")
    return [
        {"id": f"q{i}", "image": f"{i // 2}.png", "kind": kinds[i % 3], "score": float(i >= wrong), "answers": ["no"]}
        for i in range(count)
    ]


def test_examples_are_mixed_and_the_same_every_time() -> None:
    rows = predictions(300, wrong=30)
    chosen = choose(rows)
    assert chosen == choose(list(reversed(rows)))
    assert len(chosen) == 12 == len({row["image"] for row in chosen})
    assert sum(not is_right(row) for row in chosen) == 3
    kinds = [row["kind"] for row in chosen]
    assert {kinds.count(kind) for kind in set(kinds)} == {4}


@pytest.mark.parametrize(("wrong", "expected"), [(0, 0), (1, 1), (300, 12)])
def test_examples_of_good_and_of_bad_models(wrong: int, expected: int) -> None:
    chosen = choose(predictions(300, wrong))
    assert len(chosen) == 12 and sum(not is_right(row) for row in chosen) == expected


def test_few_examples() -> None:
    assert len(choose(predictions(4, 0))) == 2  # of two images
    assert choose([]) == []


def test_attention_is_shown_for_different_kinds_and_right_answers_first() -> None:
    rows = choose(predictions(300, wrong=30))
    looked = choose_for_attention(rows)
    assert {row["kind"] for row in looked} == {"color", "shape", "yes/no"} and all(is_right(row) for row in looked)
    assert len(choose_for_attention(rows[:2])) == 2
    assert choose_for_attention([rows[0] | {"image": None}]) == []


def test_smoothing() -> None:
    assert smooth([2.0] * 9, 3) == pytest.approx([2.0] * 9)
    assert smooth([1.0, math.nan, 3.0], 100) == pytest.approx([2.0] * 3, abs=1e-3)
    assert np.isnan(smooth([math.nan], 1)).all()
    noise = np.random.default_rng(0).normal(size=400)
    assert np.std(smooth(noise.tolist(), 10)) < 0.3


def test_units() -> None:
    assert [units.scaled(x) for x in (7.0, 1661952, 999.9e6, 41.96e12)] == ["7 ", "1.66 M", "1.00 G", "42.0 T"]
    assert units.flops(92_700_000) == "92.7 MFLOPs" and units.flops(8.5e12) == "8.50 TFLOPs"
    assert [units.duration(x) for x in (8.2, 502, 940, 4000)] == ["8 s", "8 min 22 s", "16 min", "1 h 06 min"]
    assert units.interval((0.9414, 0.9543)) == "94.1 to 95.4"
    assert units.percent(None) == units.flops(None) == units.duration(None)


def test_attention_tile_is_bright_where_attention_is() -> None:
    weights = np.zeros(16, np.float32)
    weights[5] = 0.3  # second row, second column
    drawn = pictures.attention_tile(np.full((32, 32, 3), 255, np.uint8), weights, 64).astype(int)
    assert drawn.shape == (64, 64, 3)
    assert drawn[24, 24].sum() > 3 * drawn[56, 56].sum()
    assert np.array_equal(drawn, pictures.attention_tile(np.full((32, 32, 3), 255, np.uint8), weights * 2, 64))
    pictures.attention_tile(np.zeros((32, 32, 3), np.uint8), np.zeros(16, np.float32))  # a layer that looks at nothing
    with pytest.raises(ValueError, match="15 patches are not a square"):
        pictures.attention_tile(np.zeros((32, 32, 3), np.uint8), np.zeros(15, np.float32))


def test_attention_is_drawn_over_what_the_encoder_reads() -> None:
    config = tiny_config("saisa")
    vision = dataclasses.replace(config.model.vision, image_size=39, patch_size=8, image_mode="resize")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vision=vision))
    attends = lambda question, images: np.ones((1, 16), np.float32)  # noqa: E731
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (39, 39, 3), dtype=np.uint8))
    row = {"id": "q", "image": image, "question": "?"}
    (looked,) = attention.look(SimpleNamespace(config=config, attention=attends), [row])
    np.testing.assert_array_equal(looked.pictures[0].pixels, pictures.tile(np.asarray(image)[:32, :32]))


def test_deep_models_show_some_of_their_layers() -> None:
    assert attention.layers_to_show(4) == [0, 1, 2, 3]
    shown = attention.layers_to_show(32)
    assert len(shown) == attention.MAX_LAYERS and shown[0] == 0 and shown[-1] == 31


def test_alignments_of_the_same_size() -> None:
    model = tiny_config("saisa").model
    costs = [flops.prefill(alignment_like(model, name), 12).total for name in ("saisa", "naavit", "llava")]
    assert costs == sorted(costs) and len(set(costs)) == 3
    assert alignment_like(alignment_like(model, "llava"), "saisa") == model


def test_what_differs_from_the_defaults() -> None:
    assert changed({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 0}, "d": 4}) == [("a.c", 2), ("d", 3)]
