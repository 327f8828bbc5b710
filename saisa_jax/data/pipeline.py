"""From a source to batches, on Grain: shuffled, shared out among processes, resumable to the batch.

    source -> shuffle, anew in each epoch -> repeat -> prepare (encode, load, augment) -> every n-th sample -> batch

The order and every random choice hang on (seed, stage, epoch, place in the shuffled epoch) alone: not on the number of
threads, and not on the number of shards either, since a shard takes every `shard_count`-th sample of one global order.
Batch k of all shards together is batch k of a single one.

Epochs join without a gap: a batch may hold the end of one and the start of the next, so that no sample is dropped but
those after the last whole batch of a stage.

The position of an iterator is the number of batches it has put out. Every thread count reads it alike; another batch
size, seed, source or shard count gives the same number another meaning, which its owner must check.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grain
import numpy as np
from jaxtyping import UInt8
from transformers import PreTrainedTokenizerFast

from saisa_jax.batch import HostBatch
from saisa_jax.config import STAGES, Config
from saisa_jax.data.conversation import Encoded, check_length, encode
from saisa_jax.data.images import ImageLoader, augment
from saisa_jax.data.packing import pack_rows
from saisa_jax.data.sample import DataError, Sample, Turn
from saisa_jax.data.sources import open_source


@dataclass(frozen=True)
class Example:
    """A sample, ready for a row; without images if the run is blind."""

    encoded: Encoded
    images: list[UInt8[np.ndarray, "size size 3"]] | None


def train_iterator(
    config: Config,
    stage: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    shard_index: int = 0,
    shard_count: int = 1,
) -> grain.DatasetIterator[HostBatch]:
    """Endless training batches of a stage, of batch_size / shard_count rows each.

    The iterator has `get_state` and `set_state`, and goes into a checkpoint with `grain.checkpoint.CheckpointSave`.

    Args:
      config: the run's.
      stage: pretrain or finetune.
      tokenizer: the run's.
      shard_index: which process this is.
      shard_count: of how many.

    Raises:
      DataError: an impossible shard; and from `next`, a sample that cannot be used.
    """
    batch_size = config.stage(stage).batch_size
    if not 0 <= shard_index < shard_count:
        raise DataError(f"shard_index={shard_index} is not one of {shard_count} shard(s)")
    if batch_size % shard_count:
        raise DataError(f"{stage}.batch_size={batch_size} is not divisible by the {shard_count} processes")
    prepare = _Prepare(config, stage, tokenizer, training=True)
    dataset = (
        grain.MapDataset.source(_source(config, stage, "train"))
        .seed(_seed(config, stage))
        .shuffle()
        .repeat()
        .random_map(prepare)[shard_index::shard_count]
        .batch(batch_size // shard_count, drop_remainder=True, batch_fn=prepare.batch)
    )
    threads = config.data.num_threads
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(config.data.prefetch, threads))
    return iter(dataset.to_iter_dataset(options))


def steps_in_stage(config: Config, stage: str) -> int:
    """Training steps of a stage: `steps`, or as many whole batches as its `epochs` hold.

    Raises:
      DataError: there is not one.
    """
    settings = config.stage(stage)
    if settings.steps is not None:
        return settings.steps
    size = len(_source(config, stage, "train"))
    steps = int(settings.epochs * size) // settings.batch_size
    if steps < 1:
        raise DataError(
            f"{stage}.epochs={settings.epochs} of {size} samples hold no batch of {settings.batch_size}; lower "
            f"{stage}.batch_size, or raise {stage}.epochs or {stage}.steps"
        )
    return steps


def eval_batches(
    config: Config, stage: str, tokenizer: PreTrainedTokenizerFast, split: str, count: int
) -> list[HostBatch]:
    """The first `count` batches of a split, in an order that is always the same; nothing is augmented.

    Fewer if the split ends before. The last one is filled up with rows of padding, whose sample ids are "".
    """
    source = _source(config, stage, split)
    prepare = _Prepare(config, stage, tokenizer, training=False)
    size = config.stage(stage).batch_size
    order = np.random.default_rng(0).permutation(len(source))[: count * size]
    batches: list[HostBatch] = []
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        batches.append(prepare.batch([prepare(source[int(i)], np.random.default_rng(int(i))) for i in chosen], size))
    return batches


class _Prepare:
    """Makes examples of samples, and batches of examples."""

    def __init__(self, config: Config, stage: str, tokenizer: PreTrainedTokenizerFast, *, training: bool) -> None:
        vision = config.model.vision
        self.config, self.settings = config, config.stage(stage)
        self.tokenizer, self.training = tokenizer, training
        self.load = ImageLoader(vision.image_size, vision.image_mode, vision.image_mean)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Example:
        data, model = self.config.data, self.config.model
        encoded = encode(
            _chosen_turns(sample, data.turns_per_sample, rng),
            self.settings.template,
            self.tokenizer,
            model.vision.num_patches,
            system_prompt=data.system_prompt,
            num_images=len(sample.images),
            sample_id=sample.id,
        )
        check_length(encoded, self.settings.text_length, model.max_length)
        if data.blind:
            return Example(encoded, None)
        images = [self.load(image, sample.id) for image in sample.images]
        if self.training and data.augment:
            images = [augment(image, rng) for image in images]
        return Example(encoded, images)

    def batch(self, examples: Sequence[Example], rows: int | None = None) -> HostBatch:
        """Rows of padding fill up to `rows`; None: there are none."""
        batch = pack_rows(
            [example.encoded for example in examples],
            [example.images for example in examples],
            self.settings.text_length,
            self.settings.max_images,
            self.config.model.vision.image_size,
            rows=rows,
        )
        ids = [example.encoded.sample_id for example in examples]
        return HostBatch(batch, (*ids, *[""] * (len(batch["tokens"]) - len(ids))))


def _chosen_turns(sample: Sample, limit: int | None, rng: np.random.Generator) -> list[Turn]:
    """The turns; if they are independent, in random order and at most `limit` questions with their answers."""
    turns = list(sample.turns)
    if not sample.independent_turns:
        return turns
    order = rng.permutation(len(turns) // 2)[:limit]
    return [turn for pair in order for turn in turns[2 * pair : 2 * pair + 2]]


def _source(config: Config, stage: str, split: str) -> Sequence[Sample]:
    settings = config.stage(stage)
    listed = settings.validation if split == "validation" else settings.sources
    if not listed:
        raise DataError(f"{stage}.sources is empty: name what to train on, as in configs/demo.py")
    return open_source(listed[0])


def _seed(config: Config, stage: str) -> int:
    """One for each seed of the run and place of the stage."""
    return int(np.random.SeedSequence([config.seed, STAGES.index(stage)]).generate_state(1)[0])
