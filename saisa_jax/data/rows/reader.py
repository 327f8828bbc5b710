"""Rows of batches, by number: which samples are in them, and reading those."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from saisa_jax.batch import Batch
from saisa_jax.config import Config
from saisa_jax.data.images import ImageLoader, augment
from saisa_jax.data.rows.collate import Example, pack_rows
from saisa_jax.data.rows.counts import Counts
from saisa_jax.data.rows.order import Concatenated, Order
from saisa_jax.data.rows.packing import PackingPlan, group, one_each, pack
from saisa_jax.data.sample import DataError, EmptyAnswerError, Sample, SourceChangedError, TooLongError
from saisa_jax.data.text.encoder import Encoder

ENDLESS = 2**40  # rows


class BatchRow(NamedTuple):
    """One row of a batch (B = 1), with what was dropped or cut in making it."""

    batch: Batch
    sample_ids: tuple[str, ...]  # of its segments 1, 2, ...; of a dropped sample too
    dropped: tuple[str, ...]  # why a sample could not be used; its segment is empty
    cut_tokens: int  # text tokens cut off the ends of samples that were too long
    unusable: int = 0  # of the dropped ones, those that `data.max_drop` limits: neither too long nor without an answer


class Reader:
    """Makes rows of samples."""

    def __init__(self, config: Config, stage: str, tokenizer: PreTrainedTokenizerFast, *, training: bool) -> None:
        vision, data = config.model.vision, config.data
        self.config, self.training = config, training
        self.encode = Encoder(config, stage, tokenizer)
        self.load = ImageLoader(vision.image_size, vision.image_mode, vision.image_mean)
        self.reorders = not data.packing  # a planned row has room for its samples as they were counted

    def row(
        self, samples: Sequence[tuple[Any, np.random.Generator]], text_length: int, max_images: int, source: Any
    ) -> BatchRow:
        """The samples of the given numbers in one row.

        Args:
          samples: (number in `source`, the random numbers of this reading).
          text_length: T.
          max_images: M.
          source: of samples, by number.
        """
        examples: list[Example | None] = []
        ids, dropped, cut_tokens, unusable = [], [], 0, 0
        for number, rng in samples:
            name = f"number {number}"
            try:
                sample = source[number]
                name = sample.id
                example, cut = self._example(sample, rng)
                cut_tokens += cut
            except DataError as error:
                if not self._may_drop(error):
                    raise
                example = None
                unusable += not isinstance(error, EmptyAnswerError | TooLongError)
                dropped.append(str(error) if name in str(error) else f"sample {name!r}: {error}")
            examples.append(example)
            ids.append(name)
        size = self.config.model.vision.image_size
        batch = pack_rows([examples], text_length, max_images, size)
        return BatchRow(batch, tuple(ids), tuple(dropped), cut_tokens, unusable)

    def _may_drop(self, error: DataError) -> bool:
        data = self.config.data
        if isinstance(error, SourceChangedError):
            return False
        if isinstance(error, EmptyAnswerError):
            return True
        return (data.on_long if isinstance(error, TooLongError) else data.on_error) == "drop"

    def _example(self, sample: Sample, rng: np.random.Generator) -> tuple[Example, int]:
        data = self.config.data
        encoded, cut = self.encode(sample, rng if self.reorders else None)
        if data.blind:
            return Example(encoded, None), cut
        # Truncation may have left later images out.
        images = [self.load(image, sample.id) for image in sample.images[: len(encoded.image_positions)]]
        if self.training and data.augment:
            images = [augment(image, rng) for image in images]
        return Example(encoded, images), cut


@dataclass
class StageRows:
    """The rows of a stage, endless, by number; may be shared by threads and handed to other processes."""

    reader: Reader
    samples: Concatenated
    order: Order
    counts: Counts | None  # of all samples; None: rows are not planned by them
    text_length: int
    max_images: int
    batch_size: int
    _first_rows: list[int] = field(default_factory=lambda: [0])  # of each epoch so far, and of the next
    _lock: Any = field(default_factory=threading.Lock)
    _epochs: dict[int, tuple[np.ndarray, PackingPlan]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None, "_epochs": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, row: int) -> BatchRow:
        epoch, order, places = self._places(int(row))
        samples = [(int(order[place]), np.random.default_rng([self.order.seed, 1, epoch, place])) for place in places]
        return self.reader.row(samples, *self.shape(int(row)), self.samples)

    def names(self, first: int) -> list[str]:
        """The samples of the batch that starts with a row; nothing of them is decoded."""
        names = []
        for row in range(first, first + self.batch_size):
            _, order, places = self._places(row)
            for number in order[places].tolist():
                try:
                    names.append(self.samples[number].id)
                except DataError:
                    names.append(f"number {number}")
        return names

    def epoch(self, epoch: int) -> tuple[np.ndarray, PackingPlan]:
        """The order of an epoch's samples, and the rows that they make."""
        with self._lock:
            if epoch not in self._epochs:
                while len(self._epochs) > 1:  # the one before is still being read
                    del self._epochs[min(self._epochs)]
                self._epochs[epoch] = self._plan(epoch)
            return self._epochs[epoch]

    def rows_in(self, epochs: float) -> int:
        """Rows of the first so many epochs."""
        whole, part = int(epochs), epochs - int(epochs)
        self._extend(whole + (part > 0))
        return self._first_rows[whole] + (int(part * self._rows_of(whole)) if part else 0)

    def samples_before(self, row: int) -> int:
        """Samples in the rows before this one, dropped ones too."""
        epoch, within = self._locate(row)
        return sum(len(self.epoch(e)[1].places) for e in range(epoch)) + int(self.epoch(epoch)[1].starts[within])

    def describe(self, steps: int) -> str:
        """A sentence about what `steps` steps read."""
        rows = steps * self.batch_size
        samples = self.samples_before(rows)
        left_out = (
            f"; {self.left_out:,} of {len(self.samples):,} samples cannot be used and are left out"
            if self.left_out
            else ""
        )
        return (
            f"{steps:,} steps read {samples:,} samples in {rows:,} rows, {samples / steps:.1f} samples a step{left_out}"
        )

    @property
    def left_out(self) -> int:
        """Samples that no row has, since they cannot be used."""
        return 0 if self.counts is None else int((self.counts[0] == 0).sum())

    def shape(self, row: int) -> tuple[int, int]:
        """(T, M) of a row: the stage's, or with `data.group_by_length` what its batch needs."""
        if not self.reader.config.data.group_by_length or self.counts is None:
            return self.text_length, self.max_images
        epoch, within = self._locate(row)
        order, plan = self.epoch(epoch)
        first = within // self.batch_size * self.batch_size
        numbers = order[plan.places[first : first + self.batch_size]]
        tokens, images = (counts[numbers].max() for counts in self.counts)
        lengths = [self.text_length // part for part in (8, 4, 2)]  # few, since each is a program of its own
        length = next((length for length in lengths if tokens <= length), self.text_length)
        return length, self.max_images if images else 0

    def _rows_of(self, epoch: int) -> int:
        # Without a plan by counts the number is known before any order is made.
        return self.order.size(epoch) if self.counts is None else len(self.epoch(epoch)[1])

    def _extend(self, epochs: int) -> None:
        while len(self._first_rows) <= epochs:
            epoch = len(self._first_rows) - 1
            size = self._rows_of(epoch)
            if not size and self.order.size(epoch):
                raise DataError(f"epoch {epoch} has no row: fewer samples than a batch of {self.batch_size}")
            with self._lock:
                if len(self._first_rows) == epoch + 1:
                    self._first_rows.append(self._first_rows[-1] + size)

    def _places(self, row: int) -> tuple[int, np.ndarray, np.ndarray]:
        """A row's epoch, the order of that epoch's samples, and which of its places are in the row."""
        epoch, within = self._locate(row)
        order, plan = self.epoch(epoch)
        return epoch, order, plan[within]

    def _locate(self, row: int) -> tuple[int, int]:
        while self._first_rows[-1] <= row:
            self._extend(len(self._first_rows))
        epoch = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return epoch, row - self._first_rows[epoch]

    def _plan(self, epoch: int) -> tuple[np.ndarray, PackingPlan]:
        order, data = self.order(epoch), self.reader.config.data
        if self.counts is None:
            return order, one_each(len(order))
        order = order[self.counts[0][order] > 0]
        tokens, images = (counts[order] for counts in self.counts)
        seed = [self.order.seed, 2, epoch]
        if data.packing:
            return order, pack(tokens, images, self.text_length, self.max_images, seed)
        order = order[group(tokens, images, self.batch_size, seed)]
        return order, one_each(len(order))
