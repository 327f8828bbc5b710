"""Rows of batches, by number: which samples are in them, and reading those."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from saisa_jax.batch import Batch
from saisa_jax.config import Config
from saisa_jax.data.images import augment
from saisa_jax.data.rows.collate import Example, pack_rows
from saisa_jax.data.rows.order import Concatenated
from saisa_jax.data.rows.packing import PackingPlan
from saisa_jax.data.rows.plans import BlockPlan, RowPlans, Start
from saisa_jax.data.sample import DataError, EmptyAnswerError, ImageSource, Sample, SourceChangedError, TooLongError
from saisa_jax.data.text.encoder import Encoder
from saisa_jax.data.views import ImageLoader

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
        self.config, self.training = config, training
        self.encode = Encoder(config, stage, tokenizer)
        self.slot = config.trained_model(stage).image_slot
        self.load = ImageLoader(config.model.vision)
        self.reorders = not config.data.packing  # a planned row has room for its samples as they were counted

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
        batch = pack_rows([examples], text_length, max_images, self.slot)
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
        kept = sample.images[: len(encoded.views)]
        images = [view for image in kept for view in self._views(image, sample.id)]
        if self.training and data.augment:
            images = [augment(image, rng) for image in images]
        return Example(encoded, images), cut

    def _views(self, image: ImageSource, sample_id: str) -> np.ndarray:
        return image if isinstance(image, np.ndarray) else self.load(image, sample_id)


class StageRows:
    """The rows of a stage, endless, by number; may be shared by threads and handed to other processes.

    Args:
      reader: of the stage.
      samples: of its sources.
      plans: of its rows.

    Attributes:
      end: the row after the last one that is read: nothing behind it is planned, or copied.
    """

    def __init__(self, reader: Reader, samples: Concatenated, plans: RowPlans) -> None:
        self.reader, self.samples, self.plans = reader, samples, plans
        self.settings, self.end = reader.config.stage(reader.encode.stage), ENDLESS
        self._reached = -1  # the first row of the last block that is read
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None, "_reached": -1}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, row: int) -> BatchRow:
        plan = self.plans.at(int(row))
        self._reach(plan)
        (epoch, block, first, _), seed = plan.start, self.plans.order.seed
        before = self.plans.order.before(epoch, block) if block else 0
        samples = [
            (int(plan.order[place]), np.random.default_rng([seed, 1, epoch, before + place]))
            for place in plan.rows[int(row) - first].tolist()
        ]
        return self.reader.row(samples, *self.shape(int(row)), self.samples)

    def go_to(self, start: Start) -> None:
        """Reads on from another block."""
        self.plans.go_to(start)
        self._reached = -1

    def names(self, first: int) -> list[str]:
        """The samples of the batch that starts with a row; nothing of them is decoded."""
        names = []
        for row in range(first, first + self.settings.batch_size):
            plan = self.plans.at(row)
            for number in plan.order[plan.rows[row - plan.start.row]].tolist():
                try:
                    names.append(self.samples[number].id)
                except DataError:
                    names.append(f"number {number}")
        return names

    def describe(self, steps: int) -> str:
        """A sentence about what `steps` steps read."""
        rows, several = steps * self.settings.batch_size, self.plans.order.blocks(0) > 1
        samples = self.plans.samples_about(rows)
        left_out = (
            f"; {self.left_out:,} of {len(self.samples):,} samples cannot be used and are left out"
            if self.left_out
            else ""
        )
        return (
            f"{steps:,} steps read {'about ' if several else ''}{samples:,} samples in {rows:,} rows, "
            f"{samples / steps:.1f} samples a step{left_out}"
        )

    @property
    def left_out(self) -> int:
        """Samples that no row has, since they cannot be used."""
        return 0 if self.plans.counts is None else int((self.plans.counts[0] == 0).sum())

    def shape(self, row: int) -> tuple[int, int]:
        """(T, M) of a row: the stage's, or with `data.group_by_length` what its batch needs."""
        text_length, max_images = self.settings.text_length, self.settings.max_images
        if not self.reader.config.data.group_by_length or self.plans.counts is None:
            return text_length, max_images
        plan, size = self.plans.at(row), self.settings.batch_size
        first = (row - plan.start.row) // size * size
        numbers = plan.order[plan.rows.places[first : first + size]]
        tokens, images = (counts[numbers].max() for counts in self.plans.counts)
        lengths = [text_length // part for part in (8, 4, 2)]  # few, since each is a program of its own
        length = next((length for length in lengths if tokens <= length), text_length)
        return length, max_images if images else 0

    def _reach(self, plan: BlockPlan) -> None:
        """When a block is read for the first time: plans the next one, and tells the sources what is read."""
        first, room = plan.start.row, self.reader.config.data.cache_bytes
        with self._lock:
            if first <= self._reached:
                return
            self._reached = first
            self.samples.expect(plan.order[plan.rows.places], plan.order[:0], room)
        if plan.stop >= self.end:
            return

        def tell(planned: Future[tuple[np.ndarray, PackingPlan]]) -> None:
            order, rows = planned.result()
            if first == self._reached:
                self.samples.expect(plan.order[plan.rows.places], order[rows.places], room)

        self.plans.after(plan).add_done_callback(tell)
