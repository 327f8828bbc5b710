"""The rows of a stage, planned block by block as they are reached.

    epoch 0, block 0 | epoch 0, block 1 | ... | epoch 1, block 0 | ...        rows are numbered through all of them

A block (`order.py`) is planned from the counts of its samples alone, while the one before is read. How many rows there
are before a block is known when those before were planned, or from a checkpoint, which says where its block begins: a
run that resumes in the ninth epoch plans nothing of the eight before.
"""

from __future__ import annotations

import bisect
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from saisa_jax.config import Config
from saisa_jax.data.rows.counts import Counts
from saisa_jax.data.rows.order import Order
from saisa_jax.data.rows.packing import PackingPlan, group, one_each, pack
from saisa_jax.data.sample import DataError

RECKONED_FROM = 2**19  # samples: within about 0.1%
_KEPT = 3  # plans: of the block that is read, the one before (its last rows) and the next one


class Start(NamedTuple):
    """Where a block begins."""

    epoch: int
    block: int  # of the epoch
    row: int
    samples: int  # in the rows before


class BlockPlan(NamedTuple):
    """The rows of a block: row r holds the samples `order[rows[r - start.row]]`."""

    start: Start
    order: Int64[np.ndarray, " n"]
    rows: PackingPlan

    @property
    def stop(self) -> int:
        """The row after its last one."""
        return self.start.row + len(self.rows)


class RowPlans:
    """The plans of a stage's rows; may be shared by threads and handed to other processes.

    Args:
      config: the run's.
      order: of the stage.
      counts: of all samples; None: rows are not planned by them, and have a sample each.
      text_length: T.
      max_images: M.
      batch_size: rows of a batch.
    """

    def __init__(
        self, config: Config, order: Order, counts: Counts | None, text_length: int, max_images: int, batch_size: int
    ) -> None:
        self.order, self.counts = order, counts
        self._packing, self._shape, self._batch_size = config.data.packing, (text_length, max_images), batch_size
        self._starts = [Start(0, 0, 0, 0)]  # of the blocks that are known, one after the other
        self._made: dict[tuple[int, int], Future[tuple[Any, PackingPlan]]] = {}  # by epoch and block
        self._lock, self._planner = threading.Lock(), ThreadPoolExecutor(1, "planner")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None, "_planner": None, "_made": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _planner=ThreadPoolExecutor(1, "planner"))

    def at(self, row: int) -> BlockPlan:
        """The plan of the block that holds a row.

        Raises:
          DataError: an epoch has no row.
        """
        while True:
            start = self._starts[max(0, bisect.bisect_right(self._starts, row, key=lambda start: start.row) - 1)]
            if row < start.row:
                self.go_to(Start(0, 0, 0, 0))
                continue
            if self.counts is None and row >= start.row + self.order.size(start.epoch, start.block):
                size = self.order.size(start.epoch, start.block)  # known before any order is made
                self._add(start, size, size)
                continue
            plan = BlockPlan(start, *self._plan(start.epoch, start.block).result())
            if row < plan.stop:
                return plan
            self._add(start, len(plan.rows), len(plan.rows.places))

    def go_to(self, start: Start) -> None:
        """Begins with another block: nothing of those before it is known, or planned."""
        with self._lock:
            self._starts = [start]

    def after(self, plan: BlockPlan) -> Future[tuple[Any, PackingPlan]]:
        """Has the block after another one planned, in the background; its (order, rows)."""
        return self._plan(*self._next(plan.start))

    def rows_in(self, epochs: float) -> int:
        """Rows of the first so many epochs. An epoch of several blocks is reckoned (`_reckoned`), not planned."""
        whole, part = int(epochs), epochs - int(epochs)
        return sum(map(self._rows_of, range(whole))) + (int(part * self._rows_of(whole)) if part else 0)

    def samples_before(self, row: int) -> int:
        """Samples in the rows before this one, dropped ones too."""
        plan = self.at(row)
        return plan.start.samples + int(plan.rows.starts[row - plan.start.row])

    def samples_about(self, row: int) -> int:
        """As `samples_before`, where epochs have several blocks without planning them: the same in every process."""
        if self.order.blocks(0) == 1:
            return self.samples_before(row)
        samples = self.order.size(0) if self.counts is None else self._total(0, self.counts[0] > 0)
        return round(row * samples / self._rows_of(0))

    def _rows_of(self, epoch: int) -> int:
        if self.counts is None:
            return self.order.size(epoch)
        if self.order.blocks(epoch) > 1:
            return self._reckoned(epoch)
        rows = len(self._plan(epoch, 0).result()[1])
        self._check_rows(epoch, rows)
        return rows

    def _reckoned(self, epoch: int) -> int:
        """About how many rows an epoch has: as many as samples drawn from all make, by what they need of a row.

        What is left of an epoch, or missing, is read of the next: rows have no end.
        """
        assert self.counts is not None
        tokens, images = self.counts
        if not self._packing:
            return int(self._total(epoch, tokens > 0))
        drawn = self._drawn(epoch)
        rows = len(pack(tokens[drawn].astype(np.int32), images[drawn].astype(np.int32), *self._shape, [0]))
        text, slots = self._shape[0], max(1, self._shape[1])
        needed = self._total(epoch, tokens) / text + self._total(epoch, images) / slots
        return round(rows * needed / (tokens[drawn].sum() / text + images[drawn].sum() / slots))

    def _drawn(self, epoch: int) -> Int64[np.ndarray, " n"]:
        """Numbers of usable samples, drawn from all sources as an epoch takes of them."""
        rng, shares = np.random.default_rng([self.order.seed, 3, epoch]), self.order.shares(epoch)
        drawn = []
        for source, share in enumerate(shares):
            first = sum(self.order.sizes[:source])
            drawn.append(first + rng.integers(self.order.sizes[source], size=RECKONED_FROM * share // sum(shares)))
        numbers = rng.permutation(np.concatenate(drawn))
        return numbers[self.counts[0][numbers] > 0] if self.counts is not None else numbers

    def _total(self, epoch: int, values: np.ndarray) -> float:
        """The sum over an epoch's samples of what is given for each sample of the sources."""
        parts = np.split(values, np.cumsum(self.order.sizes)[:-1])
        return sum(
            share * float(part.sum(dtype=np.int64)) / len(part)
            for share, part in zip(self.order.shares(epoch), parts, strict=True)
        )

    def _check_rows(self, epoch: int, rows: int) -> None:
        if not rows and self.order.size(epoch):
            raise DataError(f"epoch {epoch} has no row: fewer samples than a batch of {self._batch_size}")

    def _next(self, start: Start) -> tuple[int, int]:
        last = start.block + 1 == self.order.blocks(start.epoch)
        return (start.epoch + 1, 0) if last else (start.epoch, start.block + 1)

    def _add(self, start: Start, rows: int, samples: int) -> None:
        """Notes where the block after `start` begins."""
        if self.order.blocks(start.epoch) == 1:
            self._check_rows(start.epoch, rows)
        with self._lock:
            if self._starts[-1] == start:
                self._starts.append(Start(*self._next(start), start.row + rows, start.samples + samples))

    def _plan(self, epoch: int, block: int) -> Future[tuple[Any, PackingPlan]]:
        with self._lock:
            if (epoch, block) not in self._made:
                while len(self._made) >= _KEPT:
                    del self._made[min(self._made)]
                self._made[epoch, block] = self._planner.submit(self._make, epoch, block)
            return self._made[epoch, block]

    def _make(self, epoch: int, block: int) -> tuple[Any, PackingPlan]:
        order = self.order(epoch, block)
        if self.counts is None:
            return order, one_each(len(order))
        order = order[self.counts[0][order] > 0]
        tokens, images = (counts[order].astype(np.int32) for counts in self.counts)
        seed = [self.order.seed, 2, *self.order.seeds(epoch, block)]
        if self._packing:
            return order, pack(tokens, images, *self._shape, seed)
        order = order[group(tokens, images, self._batch_size, seed)]
        return order, one_each(len(order))
