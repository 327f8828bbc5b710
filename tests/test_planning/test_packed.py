"""Rows as packing fills them, without the data."""

from __future__ import annotations

import dataclasses
import importlib

import numpy as np
import pytest

from saisa_jax.config import Config, from_config_dict
from saisa_jax.planning.packed import AttentionShares, attention_shares, packed_rows

PATCHES = 4


def test_samples_stand_where_the_encoder_would_place_them() -> None:
    counts = np.array([3, 2, 4], np.int32), np.array([1, 0, 2], np.int32)  # each fills a row of its own
    batch = packed_rows(counts, text=4, images=2, patches=PATCHES, before=1)
    rows = {tuple(row[segment > 0]) for row, segment in zip(batch["positions"], batch["segment_ids"], strict=True)}
    assert rows == {(0, 5, 6), (0, 1), (0, 9, 10, 11)}  # "<s> <image> a b", "<s> a", "<s> <image> <image> a b c"
    held = batch["image_segment_ids"] > 0
    assert sorted(batch["image_positions"][held].tolist()) == [1, 1, 1 + PATCHES]


def test_a_sample_beside_another_has_its_own_segment() -> None:
    batch = packed_rows((np.full(2, 3, np.int32), np.ones(2, np.int32)), text=6, images=2, patches=PATCHES, before=1)
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 2]]
    assert batch["image_segment_ids"].tolist() == [[1, 2]]


def test_shares_of_the_recipes_rows() -> None:
    """By sums over all samples, 8.7% of the pairs are legal; tiles with one are more than a quarter."""
    recipe = from_config_dict(Config, importlib.import_module("configs.saisa_vicuna_7b").get_config())
    model = dataclasses.replace(recipe.model, attention_impl="flash")
    shares = attention_shares(model, recipe.finetune, packing=True)
    assert shares.legal == pytest.approx(0.0874, abs=0.002) and 0.25 < shares.visited < 0.3
    assert attention_shares(model, recipe.finetune, packing=False) == AttentionShares(1.0, 1.0)
