"""Which samples share a row: packing by text tokens and image slots at once, planned before anything is read.

A plan is made for an epoch from the counts of its samples alone, so that row i is a function of (seed, epoch, i), the
number of rows is known, and a position in the data is one number.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64

WINDOW = 4096  # samples that are packed together: more samples fill rows better, fewer keep the order more local


@dataclass(frozen=True)
class PackingPlan:
    """The rows of an epoch: row r holds `places[starts[r] : starts[r + 1]]`, places in the epoch's order of samples."""

    places: Int64[np.ndarray, " n"]
    starts: Int64[np.ndarray, " rows_and_end"]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> Int64[np.ndarray, " m"]:
        return self.places[self.starts[row] : self.starts[row + 1]]


def one_each(count: int) -> PackingPlan:
    """A row for each sample."""
    return PackingPlan(np.arange(count), np.arange(count + 1))


def pack(
    tokens: Int32[np.ndarray, " n"],
    images: Int32[np.ndarray, " n"],
    text_length: int,
    max_images: int,
    seed: list[int],
    window: int = WINDOW,
) -> PackingPlan:
    """Rows that are filled within windows of the epoch's order, and then shuffled.

    Args:
      tokens: of each sample, in the epoch's order; none exceeds `text_length`.
      images: likewise; none exceeds `max_images`.
      text_length: T.
      max_images: M.
      seed: of the shuffle of rows, without which the rows of leftovers would be next to each other.
      window: samples that are packed together.
    """
    rows: list[np.ndarray] = []
    for start in range(0, len(tokens), window):
        part = slice(start, start + window)
        found = _fill(tokens[part], images[part], text_length, max_images)
        rows += [start + np.array(row, np.int64) for row in found]
    rows = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return PackingPlan(np.concatenate([*rows, np.zeros(0, np.int64)]), starts)


def _fill(tokens: np.ndarray, images: np.ndarray, text_length: int, max_images: int) -> list[list[int]]:
    """Rows that run out of text and of slots at the same time; each holds its samples in the epoch's order.

    A row starts with the sample that needs most of a row. As long as slots are left, it takes the longest sample that
    leaves the others an equal share of the text; then text alone. (First-fit by size alone puts long samples together
    and short ones, so that the first rows leave slots empty and the last ones text.)
    """
    kinds: dict[int, list[tuple[int, int]]] = {}  # by number of images: (tokens, place), the shortest first
    for place in np.argsort(tokens, kind="stable").tolist():
        kinds.setdefault(int(images[place]), []).append((int(tokens[place]), place))
    by_images = sorted(kinds, reverse=True)

    def longest(kind: int, most: float, room: int) -> int | None:
        """The index in its list of the longest sample of at most `most` tokens, or else of the shortest that fits."""
        items = kinds[kind]
        at = bisect.bisect_right(items, (most, len(tokens))) - 1
        return at if at >= 0 else (0 if items and items[0][0] <= room else None)

    rows: list[list[int]] = []
    while any(kinds.values()):
        text, slots, row = text_length, max_images, []
        share = lambda kind: max(kinds[kind][-1][0] / text_length, kind / max(max_images, 1))  # noqa: E731
        kind = max((kind for kind in by_images if kinds[kind]), key=share)
        at: int | None = len(kinds[kind]) - 1
        while at is not None:
            count, place = kinds[kind].pop(at)
            text, slots = text - count, slots - kind
            row.append(place)
            at = None
            for kind in by_images:
                if kind <= slots and (at := longest(kind, text * kind / slots if kind else text, text)) is not None:
                    break
        rows.append(sorted(row))
    return rows


def group(
    tokens: Int32[np.ndarray, " n"], images: Int32[np.ndarray, " n"], batch_size: int, seed: list[int]
) -> Int64[np.ndarray, " m"]:
    """Places of an epoch's samples, so that a batch holds samples of like length, all with an image or all without.

    Samples beyond the last whole batch of each kind make up batches together; what is left of those is left out.

    Args:
      tokens: of each sample, in the epoch's order.
      images: likewise.
      batch_size: rows of a batch.
      seed: of the shuffle of batches.
    """
    batches, rest = [], []
    for kind in (np.flatnonzero(images == 0), np.flatnonzero(images > 0)):
        for start in range(0, len(kind), WINDOW):
            window = kind[start : start + WINDOW]
            ordered = window[np.argsort(tokens[window], kind="stable")]
            whole = len(ordered) // batch_size * batch_size
            batches += list(ordered[:whole].reshape(-1, batch_size))
            rest.append(ordered[whole:])
    over = np.concatenate([*rest, np.zeros(0, np.int64)])
    batches += list(over[: len(over) // batch_size * batch_size].reshape(-1, batch_size))
    order = np.random.default_rng(seed).permutation(len(batches))
    return np.concatenate([*(batches[i] for i in order), np.zeros(0, np.int64)]).astype(np.int64)
