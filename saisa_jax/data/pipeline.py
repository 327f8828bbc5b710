"""From sources to batches: planned rows, read at random by Grain, resumable to the row.

    sources -> order of an epoch (order.py) -> plan of its rows (plan.py) -> read a row -> batch

Everything hangs on numbers alone: row i of a stage is a function of (seed, stage, i), and so is every random choice in
it. Step k reads the rows k * batch_size ... (k + 1) * batch_size - 1; a process reads its own share of them. So the
position in the data is one row number, the same for any number of threads, workers and processes. (The state of Grain's
own workers means something else when their number changes; it is never kept.)

Epochs join without a gap: a batch may hold the end of one and the start of the next, so that no row is dropped but
those after the last whole batch of a stage. (`data.group_by_length` ends each epoch with a whole batch.)
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import logging
from transformers import PreTrainedTokenizerFast

from saisa_jax.batch import Batch, HostBatch
from saisa_jax.config import STAGES, Config, SourceConfig
from saisa_jax.data.counts import Counts, count, fingerprint
from saisa_jax.data.encoder import Encoder
from saisa_jax.data.images import ImageLoader, augment
from saisa_jax.data.order import Concatenated, Order
from saisa_jax.data.packing import Example, pack_rows
from saisa_jax.data.plan import Plan, group, one_each, pack
from saisa_jax.data.sample import DataError, Sample, Samples, TooLongError
from saisa_jax.data.sources import open_source

_ENDLESS = 2**40  # rows


class Row(NamedTuple):
    """One row of a batch (B = 1), and what happened on the way to it."""

    batch: Batch
    sample_ids: tuple[str, ...]  # of its segments 1, 2, ...; of a dropped sample too
    dropped: tuple[str, ...]  # why a sample could not be used; its segment is empty
    cut_tokens: int  # text tokens cut off the ends of samples that were too long


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
    ) -> Row:
        """The samples of the given numbers in one row.

        Args:
          samples: (number in `source`, the random numbers of this reading).
          text_length: T.
          max_images: M.
          source: of samples, by number.
        """
        examples: list[Example | None] = []
        ids, dropped, cut_tokens = [], [], 0
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
                dropped.append(str(error) if name in str(error) else f"sample {name!r}: {error}")
            examples.append(example)
            ids.append(name)
        size = self.config.model.vision.image_size
        return Row(pack_rows([examples], text_length, max_images, size), tuple(ids), tuple(dropped), cut_tokens)

    def _may_drop(self, error: DataError) -> bool:
        data = self.config.data
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
class Rows:
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
    _epochs: dict[int, tuple[np.ndarray, Plan]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None, "_epochs": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, row: int) -> Row:
        epoch, within = self._locate(int(row))
        order, plan = self.epoch(epoch)
        places = plan[within]
        samples = [(int(order[place]), np.random.default_rng([self.order.seed, 1, epoch, place])) for place in places]
        return self.reader.row(samples, *self.shape(int(row)), self.samples)

    def epoch(self, epoch: int) -> tuple[np.ndarray, Plan]:
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
        """What so many steps read, in words."""
        rows = steps * self.batch_size
        samples = self.samples_before(rows)
        unusable = 0 if self.counts is None else int((self.counts[0] == 0).sum())
        left_out = (
            f"; {unusable:,} of {len(self.samples):,} samples cannot be used and are left out" if unusable else ""
        )
        return (
            f"{steps:,} steps read {samples:,} samples in {rows:,} rows, {samples / steps:.1f} samples a step{left_out}"
        )

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

    def _locate(self, row: int) -> tuple[int, int]:
        while self._first_rows[-1] <= row:
            self._extend(len(self._first_rows))
        epoch = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return epoch, row - self._first_rows[epoch]

    def _plan(self, epoch: int) -> tuple[np.ndarray, Plan]:
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


@lru_cache(maxsize=4)
def stage_rows(config: Config, stage: str, tokenizer: PreTrainedTokenizerFast, cache: str | None = None) -> Rows:
    """The training rows of a stage; what the samples are counted for is done once.

    Args:
      config: the run's.
      stage: pretrain or finetune.
      tokenizer: the run's.
      cache: a directory where counts are kept from one start to the next.

    Raises:
      DataError: no source, or one that cannot be read; a sample that cannot be used, where rows are planned.
    """
    settings = config.stage(stage)
    if not settings.sources:
        raise DataError(f"{stage}.sources is empty: name what to train on; configs/demo.py and the README show how")
    chosen = [source for source in settings.sources if source.weight > 0]
    opened = [open_source(source) for source in chosen]
    counts = None
    if config.data.packing or config.data.group_by_length:
        whole = _counted(opened, chosen, config, stage, tokenizer, cache)
        counts = _planned(whole, Concatenated(opened), Encoder(config, stage, tokenizer))
    return Rows(
        Reader(config, stage, tokenizer, training=True),
        Concatenated(opened),
        Order(tuple(map(len, opened)), tuple(source.weight for source in chosen), _seed(config, stage)),
        counts,
        settings.text_length,
        settings.max_images,
        settings.batch_size,
    )


def steps_in_stage(config: Config, stage: str, tokenizer: PreTrainedTokenizerFast, cache: str | None = None) -> int:
    """Training steps of a stage: `steps`, or as many whole batches as its `epochs` hold.

    Raises:
      DataError: there is not one.
    """
    settings = config.stage(stage)
    rows = stage_rows(config, stage, tokenizer, cache)
    if settings.steps is not None:
        return settings.steps
    size = rows.rows_in(settings.epochs)
    if size < settings.batch_size:
        raise DataError(
            f"{stage}.epochs={settings.epochs} of {len(rows.samples)} samples hold {size} rows and no batch of "
            f"{settings.batch_size}; lower {stage}.batch_size, or raise {stage}.epochs or {stage}.steps"
        )
    return size // settings.batch_size


class TrainIterator(Iterator[HostBatch]):
    """A process's share of the training batches, endless; its state is the number of the next row."""

    def __init__(self, rows: Rows, shard_index: int, shard_count: int) -> None:
        self._rows, self._shard = rows, (shard_index, shard_count)
        self._next_row = 0  # of all processes together
        self._batches: Any = None

    def __next__(self) -> HostBatch:
        if self._batches is None:
            self._batches = self._open()
        batch = next(self._batches)
        self._next_row += self._rows.batch_size
        return batch

    def get_state(self) -> dict[str, int]:
        return {"next_row": self._next_row}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on at another row, whatever number of threads, workers or processes it was reached with.

        Raises:
          DataError: a row in the middle of a batch.
        """
        row = int(state["next_row"])
        if row % self._rows.batch_size:
            raise DataError(f"row {row} is not the start of a batch of {self._rows.batch_size}; set batch_size back")
        self.close()
        self._next_row = row

    def close(self) -> None:
        """Ends the workers."""
        if self._batches is not None:
            self._batches.close()
        self._batches = None

    def _open(self) -> Any:
        data, per_shard = self._rows.reader.config.data, self._rows.batch_size // self._shard[1]
        share = _Share(self._rows, *self._shard, self._next_row)
        threads = data.num_threads
        buffered = max(data.prefetch * per_shard, threads)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffered if threads else 0)
        read = grain.MapDataset.source(share).to_iter_dataset(options)
        if data.num_workers:
            each = -(-buffered // data.num_workers)
            read = read.mp_prefetch(grain.MultiprocessingOptions(data.num_workers, per_worker_buffer_size=each))
        return iter(read.batch(per_shard, drop_remainder=True, batch_fn=_batched))


@dataclass(frozen=True)
class _Share:
    """One process's rows, from a row on: of every batch the rows that its devices own."""

    rows: Rows
    shard: int
    shards: int
    start: int

    def __len__(self) -> int:
        return _ENDLESS // self.shards

    def __getitem__(self, index: int) -> Row:
        per_shard = self.rows.batch_size // self.shards
        step, within = divmod(int(index), per_shard)
        return self.rows[self.start + step * self.rows.batch_size + self.shard * per_shard + within]


def train_iterator(
    config: Config,
    stage: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    shard_index: int = 0,
    shard_count: int = 1,
    cache: str | None = None,
) -> TrainIterator:
    """Endless training batches of a stage, of batch_size / shard_count rows each.

    Args:
      config: the run's.
      stage: pretrain or finetune.
      tokenizer: the run's.
      shard_index: which share of every batch: rows index * size ... (index + 1) * size - 1 of it.
      shard_count: of how many.
      cache: as in `stage_rows`.

    Raises:
      DataError: an impossible shard; and from `next`, a sample that cannot be used.
    """
    batch_size = config.stage(stage).batch_size
    if not 0 <= shard_index < shard_count:
        raise DataError(f"shard_index={shard_index} is not one of {shard_count} shard(s)")
    if batch_size % shard_count:
        raise DataError(f"{stage}.batch_size={batch_size} is not divisible by the {shard_count} processes")
    return TrainIterator(stage_rows(config, stage, tokenizer, cache), shard_index, shard_count)


def eval_batches(config: Config, stage: str, tokenizer: PreTrainedTokenizerFast, limit: int) -> list[HostBatch]:
    """The first `limit` batches of what a stage holds out, one sample a row, always in the same order.

    Fewer if there is less. The last one is filled up with rows of padding, which have no sample.
    """
    settings = config.stage(stage)
    source = Concatenated([open_source(held_out) for held_out in settings.validation])
    reader = Reader(config, stage, tokenizer, training=False)
    size = settings.batch_size
    order = np.random.default_rng(0).permutation(len(source))[: limit * size]
    padding = Row(pack_rows([[]], settings.text_length, settings.max_images, config.model.vision.image_size), (), (), 0)
    batches: list[HostBatch] = []
    for start in range(0, len(order), size):
        rows = [
            reader.row([(i, np.random.default_rng(i))], settings.text_length, settings.max_images, source)
            for i in order[start : start + size].tolist()
        ]
        batches.append(_batched(rows + [padding] * (size - len(rows))))
    return batches


def _batched(rows: Sequence[Row]) -> HostBatch:
    """Rows as a batch.

    Raises:
      DataError: nothing in it is supervised, because every sample was dropped.
    """
    batch: Batch = {name: np.concatenate([row.batch[name] for row in rows]) for name in rows[0].batch}  # type: ignore
    dropped = tuple(reason for row in rows for reason in row.dropped)
    if not batch["loss_weights"].any():
        raise DataError(f"no sample of a batch can be used: {'; '.join(dropped[:5])}")
    return HostBatch(batch, tuple(row.sample_ids for row in rows), dropped, sum(row.cut_tokens for row in rows))


# --- Counts ----------------------------------------------------------------------------------------------------------


def stage_counts(config: Config, stage: str, tokenizer: PreTrainedTokenizerFast) -> Counts:
    """Text tokens and images of all samples of a stage that can be used, in full length; errors as `stage_rows`."""
    chosen = [source for source in config.stage(stage).sources if source.weight > 0]
    if not chosen:
        raise DataError(f"{stage}.sources is empty: name what to train on")
    tokens, images = _counted([open_source(source) for source in chosen], chosen, config, stage, tokenizer, None)
    return tokens[tokens > 0], images[tokens > 0]


def _counted(
    opened: Sequence[Samples],
    sources: Sequence[SourceConfig],
    config: Config,
    stage: str,
    tokenizer: PreTrainedTokenizerFast,
    cache: str | None,
) -> Counts:
    """The counts of all sources: of a source's own index, of the cache, or counted now."""
    parts = [
        _counts_of(samples, source, config, stage, tokenizer, cache)
        for samples, source in zip(opened, sources, strict=True)
    ]
    tokens, images = (np.concatenate(part) for part in zip(*parts, strict=True))
    return tokens, images


def _counts_of(
    samples: Samples,
    source: SourceConfig,
    config: Config,
    stage: str,
    tokenizer: PreTrainedTokenizerFast,
    cache: str | None,
) -> Counts:
    mark = fingerprint(config, stage, tokenizer)
    indexed = getattr(samples, "counts", None)
    if indexed is not None and (found := indexed(mark)) is not None:
        return found
    if cache is None:
        return count(samples, config, stage, tokenizer)
    key = hashlib.sha256(repr((source, len(samples), _stamp(source), mark)).encode()).hexdigest()[:16]
    path = Path(cache) / f"counts-{key}.npz"
    if path.exists():
        with np.load(path) as stored:
            return stored["tokens"], stored["images"]
    tokens, images = count(samples, config, stage, tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".tmp.npz")
    np.savez(half, tokens=tokens, images=images)
    half.replace(path)
    return tokens, images


def _stamp(source: SourceConfig) -> tuple[int, int] | None:
    """When a source's file was written, and its size."""
    path = Path(source.path)
    return (path.stat().st_mtime_ns, path.stat().st_size) if source.path and path.is_file() else None


def _planned(counts: Counts, samples: Any, encoder: Encoder) -> Counts:
    """The room that samples need in a row, at most: counts after truncation, and 0 tokens for what is left out.

    Raises:
      DataError: a sample that does not fit, where it is not to be dropped.
    """
    tokens, images = counts
    config, settings = encoder.config, encoder.config.stage(encoder.stage)
    room = np.minimum(settings.text_length, config.model.max_length - images * config.model.vision.num_patches)
    for wrong, policy in ((tokens > room, config.data.on_long), (images > settings.max_images, config.data.on_error)):
        if policy == "raise":
            for number in np.flatnonzero(wrong)[:1]:
                encoder(samples[int(number)])  # it says what does not fit
        elif policy == "drop" and wrong.any():
            logging.warning("%s: %d samples that do not fit a row are left out", encoder.stage, wrong.sum())
            tokens = np.where(wrong, 0, tokens)
    return np.minimum(tokens, settings.text_length), np.minimum(images, settings.max_images)


def _seed(config: Config, stage: str) -> int:
    """One for each seed of the run and place of the stage."""
    return int(np.random.SeedSequence([config.seed, STAGES.index(stage)]).generate_state(1)[0])
