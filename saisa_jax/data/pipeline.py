"""From sources to batches: planned rows, read at random by Grain, resumable to the row.

    sources -> order of a block (order.py) -> plan of its rows (plans.py, packing.py) -> read a row -> batch

Everything is a function of numbers: row i of a stage is a function of (seed, stage, i), and so is every random choice
in it. Step k reads the rows k * batch_size ... (k + 1) * batch_size - 1; a process reads those that its devices hold.
So the position in the data is one row number, the same for any number of threads, workers and processes. (The state of
Grain's own workers depends on their number; it is never saved.)

Blocks and epochs join without a gap: a batch may hold the end of one and the start of the next, so that no row is
dropped but those after the last whole batch of a stage. (`data.group_by_length` ends each block with a whole batch.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import grain
import numpy as np
from transformers import PreTrainedTokenizerFast

from saisa_jax.batch import Batch, HostBatch, Slot
from saisa_jax.config import STAGES, Config, SourceConfig, StageConfig
from saisa_jax.data.features import FeatureSpec, check_encoder, check_sources, held_by
from saisa_jax.data.rows.collate import pack_rows
from saisa_jax.data.rows.counting import Effort
from saisa_jax.data.rows.counts import Counts, counts_of_sources, room_needed
from saisa_jax.data.rows.mark import content_mark, counts_mark
from saisa_jax.data.rows.order import Concatenated, Order
from saisa_jax.data.rows.plans import RowPlans, Start
from saisa_jax.data.rows.reader import ENDLESS, BatchRow, Reader, StageRows
from saisa_jax.data.rows.unusable import Unusable, check_unusable
from saisa_jax.data.sample import DataError, Samples
from saisa_jax.data.sources import open_source, warn_of_text_alone
from saisa_jax.data.text.encoder import Encoder, warn_of_unknown_words

MOST_THREADS = 16


class StageData:
    """The data of a stage. Samples are counted once, when they are first asked for, and rows planned block by block.

    Args:
      config: the run's.
      stage: pretrain or finetune.
      tokenizer: the run's.
      cache: a directory where counts are kept from one start to the next; several processes of a run have the same.
      effort: who counts.
    """

    def __init__(
        self,
        config: Config,
        stage: str,
        tokenizer: PreTrainedTokenizerFast,
        cache: str | None = None,
        effort: Effort = Effort(),  # noqa: B008  # it is frozen
    ) -> None:
        self._config, self._stage, self._tokenizer, self._cache = config, stage, tokenizer, cache
        self._settings, self._effort = config.stage(stage), effort

    @cached_property
    def _opened(self) -> tuple[list[Samples], list[SourceConfig]]:
        """The sources that an epoch goes through."""
        chosen = _chosen_sources(self._settings, self._stage)
        return _opened(chosen, self._config), chosen

    @cached_property
    def _held_out(self) -> list[Samples]:
        return _opened(self._settings.validation, self._config)

    @cached_property
    def _contents(self) -> list[str]:
        """What each source holds (`content_mark`)."""
        return [content_mark(*each) for each in zip(*self._opened, strict=True)]

    @cached_property
    def rows(self) -> StageRows:
        """The training rows.

        Raises:
          DataError: no source, or one that cannot be read; a sample that cannot be used, where rows are planned.
          CountingStopped: it was asked to stop while samples were counted.
        """
        config, stage, settings, tokenizer = self._config, self._stage, self._settings, self._tokenizer
        opened, chosen = self._opened
        encoder = Encoder(config, stage, tokenizer)
        # What `data prepare` made of a bucket's data it has warned of; to look again is to copy file after file.
        near = [each for each in zip(opened, chosen, strict=True) if not Concatenated(each[:1]).copied]
        warn_of_text_alone([samples for samples, _ in near], [source for _, source in near])
        warn_of_unknown_words([samples for samples, _ in near], encoder)
        counts = None
        if config.data.packing or config.data.group_by_length:
            contents = self._contents if self._cache is not None else ()
            whole, unusable = counts_of_sources(opened, chosen, encoder, self._effort, self._cache, contents)
            counts = room_needed(whole, Concatenated(opened), encoder, unusable)
        order = Order(
            tuple(map(len, opened)),
            tuple(source.weight for source in chosen),
            _seed(config, stage),
            config.data.shuffle_block_size,
            tuple(getattr(samples, "pieces", None) for samples in opened),
        )
        plans = RowPlans(config, order, counts, settings.text_length, settings.max_images, settings.batch_size)
        return StageRows(Reader(config, stage, tokenizer, training=True), Concatenated(opened), plans)

    @cached_property
    def steps(self) -> int:
        """Training steps: the stage's `steps`, or as many whole batches as its `epochs` hold.

        Raises:
          DataError: as `rows`; or there is not one batch.
        """
        settings, rows = self._settings, self.rows
        if settings.steps is not None:
            return settings.steps
        size = rows.plans.rows_in(settings.epochs)
        if size < settings.batch_size:
            raise DataError(
                f"{self._stage}.epochs={settings.epochs} of {len(rows.samples)} samples hold {size} rows and no batch "
                f"of {settings.batch_size}; lower {self._stage}.batch_size, or raise {self._stage}.epochs or "
                f"{self._stage}.steps"
            )
        return size // settings.batch_size

    @cached_property
    def mark(self) -> dict[str, Any]:
        """What the training samples are, for a checkpoint: {"samples", "content"} of each source, "counts" of all.

        It does not depend on where they lie. Of pictures it knows only how many a sample has.
        """
        rows = self.rows
        counts, order = rows.plans.counts, rows.plans.order
        mark = {
            "samples": list(map(len, rows.samples.sources)),
            "content": self._contents,
            "counts": None if counts is None else counts_mark(counts),
        }
        # Epochs of one block are in the order that earlier versions gave them.
        return mark | ({"shuffle_block_size": order.block} if order.blocks(0) > 1 else {})

    def check_features(self, wanted: FeatureSpec) -> None:
        """Raises DataError where a source of the stage, held out or not, has features of another encoder."""
        opened, chosen = self._opened
        sources = (*chosen, *self._settings.validation)
        for samples, source in zip((*opened, *self._held_out), sources, strict=True):
            if held := held_by(samples):
                check_encoder(held, wanted, str(source))

    def batches(self, own: Sequence[int] | None = None) -> TrainIterator:
        """Endless training batches.

        Args:
          own: which rows of every batch this process reads (`parallel.own_rows`); None: all.

        Raises:
          DataError: as `rows`; rows that a batch does not have; and from `next`, a sample that cannot be used.
        """
        size = self._settings.batch_size
        own = range(size) if own is None else own
        if not own or not set(own) <= set(range(size)):
            raise DataError(
                f"rows {list(own)} are not among those of {self._stage}.batch_size={size}, which count from 0"
            )
        self.rows.end = self.steps * size
        return TrainIterator(self.rows, own)

    def held_out(self, limit: int) -> list[HostBatch]:
        """The first `limit` batches of what the stage holds out, one sample a row, always in the same order.

        Fewer if there is less. The last one is filled with rows of padding, which have no sample.

        Raises:
          DataError: a sample that cannot be used (or, with `data.on_error=drop`, too many), or a batch without one that
            can.
        """
        config, settings = self._config, self._settings
        source = Concatenated(self._held_out)
        reader = Reader(config, self._stage, self._tokenizer, training=False)
        size, shape = settings.batch_size, (settings.text_length, settings.max_images)
        order = np.random.default_rng(0).permutation(len(source))[: limit * size]
        padding = _padding_row(*shape, reader.slot)
        batches: list[HostBatch] = []
        unusable = Unusable()
        for start in range(0, len(order), size):
            rows = [
                reader.row([(i, np.random.default_rng(i))], *shape, source)
                for i in order[start : start + size].tolist()
            ]
            batches.append(_batched(rows + [padding] * (size - len(rows))))
            if not batches[-1].batch["loss_weights"].any():
                raise DataError(f"no held-out sample of a batch can be used: {'; '.join(batches[-1].dropped[:5])}")
            unusable.add(*(reason for row in rows if row.unusable for reason in row.dropped))
        check_unusable(unusable, len(order), config.data, f"{self._stage}.validation")
        return batches


def _chosen_sources(settings: StageConfig, stage: str) -> list[SourceConfig]:
    """Those that an epoch goes through."""
    if not settings.sources:
        raise DataError(f"{stage}.sources is empty: name what to train on; configs/demo.py and docs/data.md show how")
    return [source for source in settings.sources if source.weight > 0]


def _opened(sources: Sequence[SourceConfig], config: Config) -> list[Samples]:
    """Samples with what the run reads of images: pixels or features."""
    opened = [open_source(source) for source in sources]
    check_sources(opened, sources, config.data.features)
    return opened


def stage_counts(config: Config, stage: str, tokenizer: PreTrainedTokenizerFast) -> Counts:
    """Text tokens and images of all samples of a stage that can be used, in full length; errors as `StageData.rows`."""
    chosen = _chosen_sources(config.stage(stage), stage)
    opened = _opened(chosen, config)
    encoder = Encoder(config, stage, tokenizer)
    (tokens, images), unusable = counts_of_sources(opened, chosen, encoder, Effort(), None)
    check_unusable(unusable, len(tokens), config.data, stage)
    return tokens[tokens > 0], images[tokens > 0]


class TrainIterator(Iterator[HostBatch]):
    """A process's rows of the training batches, endless; its state is the number of the next global row."""

    def __init__(self, rows: StageRows, own: Sequence[int]) -> None:
        self._rows, self._own = rows, tuple(own)
        self._next_row = 0  # of all processes together
        self._batches: Any = None

    def __next__(self) -> HostBatch:
        if self._batches is None:
            self._batches = self._open()
        batch = next(self._batches)
        self._next_row += self._rows.settings.batch_size
        return batch

    def padding(self) -> HostBatch:
        """Empty rows in the shape of the next batch."""
        shape = self._rows.shape(self._next_row)
        empty = _padding_row(*shape, self._rows.reader.slot)
        return _batched([empty] * len(self._own))

    def get_state(self) -> dict[str, Any]:
        """The next row, and where the block of the one before begins: nothing earlier has to be planned again."""
        return {"next_row": self._next_row, "block": list(self._rows.plans.at(max(0, self._next_row - 1)).start)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from another row; the number of threads, workers and processes does not matter.

        Raises:
          DataError: a row in the middle of a batch.
        """
        row = int(state["next_row"])
        if row % self._rows.settings.batch_size:
            size = self._rows.settings.batch_size
            raise DataError(f"row {row} is not the start of a batch of {size}; set batch_size back")
        self.close()
        self._next_row = row
        self._rows.go_to(Start(*state.get("block", (0, 0, 0, 0))))  # earlier versions wrote none

    def close(self) -> None:
        """Stops the workers."""
        if self._batches is not None:
            self._batches.close()
        self._batches = None

    def _open(self) -> Any:
        data, share = self._rows.reader.config.data, _Share(self._rows, self._own, self._next_row)
        threads = data.num_threads
        if threads is None:
            threads = max(1, min(MOST_THREADS, (os.cpu_count() or 1) // max(1, data.num_workers)))
        buffered = max(data.prefetch * len(self._own), threads)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffered if threads else 0)
        read = grain.MapDataset.source(share).to_iter_dataset(options)
        if data.num_workers:
            each = -(-buffered // data.num_workers)
            read = read.mp_prefetch(grain.MultiprocessingOptions(data.num_workers, per_worker_buffer_size=each))
        return iter(read.batch(len(self._own), drop_remainder=True, batch_fn=_batched))


@dataclass(frozen=True)
class _Share:
    """One process's rows, from a row on: of every batch the rows that its devices hold."""

    rows: StageRows
    own: tuple[int, ...]  # within a batch
    start: int

    def __len__(self) -> int:
        return ENDLESS // self.rows.settings.batch_size * len(self.own)

    def __getitem__(self, index: int) -> BatchRow:
        step, within = divmod(int(index), len(self.own))
        return self.rows[self.start + step * self.rows.settings.batch_size + self.own[within]]


def _padding_row(text_length: int, max_images: int, image: Slot) -> BatchRow:
    return BatchRow(pack_rows([[]], text_length, max_images, image), (), (), 0)


def _batched(rows: Sequence[BatchRow]) -> HostBatch:
    """Rows as a batch."""
    batch: Batch = {name: np.concatenate([row.batch[name] for row in rows]) for name in rows[0].batch}  # type: ignore
    lost = [(len(row.dropped), row.cut_tokens, row.unusable) for row in rows]
    dropped = tuple(reason for row in rows for reason in row.dropped)
    return HostBatch(batch, tuple(row.sample_ids for row in rows), dropped, np.asarray(lost, np.int32))


def _seed(config: Config, stage: str) -> int:
    """One for each seed of the run and place of the stage."""
    return int(np.random.SeedSequence([config.seed, STAGES.index(stage)]).generate_state(1)[0])
