"""Shares of attention's square: by hand for one small row, and tiles."""

from __future__ import annotations

import dataclasses

import pytest

from saisa_jax.batch import empty_batch
from saisa_jax.config import FlamingoConfig, ProjectorConfig
from saisa_jax.models import attention_tpu
from saisa_jax.models.pairs import legal_share, visited_share
from saisa_jax.testing.configs import tiny_config

CONFIG = tiny_config().model
PATCHES = CONFIG.vision.num_patches
FLAMINGO = {
    "alignment": "flamingo",
    "projector": ProjectorConfig(sharing="shared"),
    "flamingo": FlamingoConfig(2),
    "sliding_window": 9999,
}


@pytest.mark.parametrize(
    ("changes", "legal", "pairs"),
    [
        ({}, 1 + (PATCHES + 2) + (PATCHES + 3), 3 * (PATCHES + 3)),
        ({"visual_layers": (1,)}, (2 * PATCHES + 6) + 6, 3 * (PATCHES + 3) + 3 * 3),  # two layers, one sees the image
        ({"sliding_window": 3}, 1 + 3 + 3, 3 * (PATCHES + 3)),
        (
            {"alignment": "llava", "projector": ProjectorConfig(sharing="shared")},
            (PATCHES + 3) * (PATCHES + 4) // 2,
            (PATCHES + 3) ** 2,
        ),
        (FLAMINGO, 2 * 6 + 2 * PATCHES, 2 * 9 + 3 * PATCHES),  # two layers, and one cross layer
        (FLAMINGO | {"flamingo": FlamingoConfig(2, True)}, 12 + 2 * PATCHES + 4, 18 + 3 * (PATCHES + 3)),
    ],
)
def test_legal_pairs_of_a_row(changes, legal, pairs) -> None:
    """The row "<s> <image> What ?"."""
    batch = empty_batch(1, 3, 1, 0)
    batch["positions"][:], batch["segment_ids"][:] = [[0, PATCHES + 1, PATCHES + 2]], 1
    batch["image_positions"][:] = batch["image_segment_ids"][:] = 1
    config = dataclasses.replace(CONFIG, **changes)
    assert float(legal_share(config, batch)) == pytest.approx(legal / pairs)


def test_flash_visits_tiles_with_a_legal_pair(monkeypatch) -> None:
    """Two samples of a tile each, and a tile of padding."""
    monkeypatch.setattr(attention_tpu, "MAX_QUERIES", 128)
    monkeypatch.setattr(attention_tpu, "MAX_KEYS", 128)
    batch = empty_batch(1, 3 * 128, 0, 0)
    batch["segment_ids"][0, :128], batch["segment_ids"][0, 128:256] = 1, 2
    batch["positions"][0, :128] = batch["positions"][0, 128:256] = range(128)
    assert float(visited_share(dataclasses.replace(CONFIG, attention_impl="flash"), batch)) == pytest.approx(2 / 9)
    assert float(visited_share(dataclasses.replace(CONFIG, attention_impl="xla"), batch)) == 1
