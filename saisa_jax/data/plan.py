"""Which samples share a row: packing by text tokens and image slots at once, planned before anything is read.

A plan is made for an epoch from the counts of its samples alone, so that row i is a function of (seed, epoch, i), the
number of rows is known, and a position in the data is one number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64

WINDOW = 4096  # samples that are packed together: more fill rows better, fewer keep neighbours near


@dataclass(frozen=True)
class Plan:
    """The rows of an epoch: row r holds `places[starts[r] : starts[r + 1]]`, places in the epoch's order of samples."""

    places: Int64[np.ndarray, " n"]
    starts: Int64[np.ndarray, " rows_and_end"]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> Int64[np.ndarray, " m"]:
        return self.places[self.starts[row] : self.starts[row + 1]]


def one_each(count: int) -> Plan:
    """A row for each sample."""
    return Plan(np.arange(count), np.arange(count + 1))


def pack(
    tokens: Int32[np.ndarray, " n"],
    images: Int32[np.ndarray, " n"],
    text_length: int,
    max_images: int,
    seed: list[int],
    window: int = WINDOW,
) -> Plan:
    """First-fit, largest first, within windows of the epoch's order; then the rows are shuffled.

    Args:
      tokens: of each sample, in the epoch's order; none exceeds `text_length`.
      images: likewise; none exceeds `max_images`.
      text_length: T.
      max_images: M.
      seed: of the shuffle of rows, which parts the large rows from the small ones that were left over.
      window: samples that are packed together.
    """
    rows: list[np.ndarray] = []
    for start in range(0, len(tokens), window):
        part = slice(start, start + window)
        found = _first_fit(tokens[part], images[part], text_length, max_images)
        rows += [start + places for places in found]
    rows = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    starts = np.cumsum([0, *map(len, rows)])
    return Plan(np.concatenate([*rows, np.zeros(0, np.int64)]).astype(np.int64), starts.astype(np.int64))


def _first_fit(tokens: np.ndarray, images: np.ndarray, text_length: int, max_images: int) -> list[np.ndarray]:
    """Each sample into the first row that has room, those that need the largest share of a row first."""
    size = np.maximum(tokens / text_length, images / max(max_images, 1))
    text_left, slots_left = np.full(len(tokens), text_length), np.full(len(tokens), max_images)
    row_of = np.empty(len(tokens), np.int64)
    used = first = 0  # rows before `first` have no room for anything
    for place in np.argsort(-size, kind="stable"):
        fits = (text_left[first : used + 1] >= tokens[place]) & (slots_left[first : used + 1] >= images[place])
        row = first + int(np.argmax(fits))
        used = max(used, row + 1)
        text_left[row] -= tokens[place]
        slots_left[row] -= images[place]
        row_of[place] = row
        while first < used and text_left[first] == 0:
            first += 1
    by_row = np.argsort(row_of, kind="stable")  # within a row in the epoch's order
    return np.split(by_row, np.flatnonzero(np.diff(row_of[by_row])) + 1) if len(tokens) else []


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
