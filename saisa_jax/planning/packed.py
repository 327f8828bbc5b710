"""Rows as packing fills them, as far as it is known without the data: where their tokens stand, and no more."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from saisa_jax.batch import Batch, empty_batch
from saisa_jax.config import ModelConfig, StageConfig, Teacher
from saisa_jax.data.rows.packing import pack
from saisa_jax.models.pairs import shares
from saisa_jax.planning.lengths import Counts, known_counts, some

ROWS = 32  # of which shares are the mean
BEFORE_IMAGE = {"plain": 1}  # text tokens of a sample that stand before its first image, by template
SYSTEM_PROMPT = 35  # of other templates: as long as Vicuna's


class AttentionShares(NamedTuple):
    """Shares of attention's pairs of a query and a key (0..1): those that are legal, and those that are computed."""

    legal: float
    visited: float


def attention_shares(
    model: ModelConfig, settings: StageConfig, packing: bool, teacher: Teacher | None = None
) -> AttentionShares:
    """Of a stage's rows; all of everything where the lengths of its samples are unknown."""
    counts = known_counts(settings, model.vision) if packing else None
    if counts is None:
        return AttentionShares(1.0, 1.0)
    before = BEFORE_IMAGE.get(settings.template, SYSTEM_PROMPT)
    rows = packed_rows(some(counts), settings.text_length, settings.max_images, model.num_visual_tokens, before)

    def of_row(row: Batch) -> tuple[jax.Array, jax.Array]:
        return shares(model, jax.tree.map(lambda x: x[None], row), teacher)

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        found = jax.jit(lambda rows: jax.lax.map(of_row, rows))(rows)
    return AttentionShares(*(float(share.mean()) for share in found))


def packed_rows(counts: Counts, text: int, images: int, patches: int, before: int, rows: int = ROWS) -> Batch:
    """Places of `rows` rows that packing makes of samples, each of which has its images after `before` text tokens.

    Args:
      counts: text tokens and images of each sample.
      text: tokens of a row (T).
      images: slots of a row (M).
      patches: visual tokens of an image (P).
    """
    tokens, pictures = np.minimum(counts[0], text), np.minimum(counts[1], images)
    plan = pack(tokens, pictures, text, images, [0])
    # Rows of few long samples and rows of many short ones in the measure in which there are any.
    squares = tokens.astype(np.int64) ** 2
    count = min(rows, len(plan))
    order = np.argsort([squares[plan[row]].sum() for row in range(len(plan))], kind="stable")
    chosen = order[((np.arange(count) + 0.5) / count * len(plan)).astype(int)].tolist()
    batch = empty_batch(len(chosen), text, images, 0)
    for row, samples in enumerate(plan[i] for i in chosen):
        at = slot = 0
        for segment, sample in enumerate(samples, start=1):
            length, shown = int(tokens[sample]), int(pictures[sample])
            first = min(before, length - 1) if shown else length
            positions = np.arange(length)
            positions[first:] += shown * patches
            batch["positions"][row, at : at + length] = positions
            batch["segment_ids"][row, at : at + length] = segment
            batch["image_positions"][row, slot : slot + shown] = first + patches * np.arange(shown)
            batch["image_segment_ids"][row, slot : slot + shown] = segment
            at, slot = at + length, slot + shown
    return batch
