"""Sources of samples: a sequence for each format, read at random, that can be handed to another process."""

from __future__ import annotations

from collections.abc import Callable

from saisa_jax.config import SourceConfig
from saisa_jax.data import easy_vqa
from saisa_jax.data.llava import JsonConversations
from saisa_jax.data.sample import DataError, Samples
from saisa_jax.data.shards import ShardedSamples
from saisa_jax.data.tfds_source import TfdsSamples

OPENERS: dict[str, Callable[[SourceConfig], Samples]] = {
    "arrayrecord": ShardedSamples,
    "chat": JsonConversations,
    "easy_vqa": lambda config: easy_vqa.samples(config.task, config.split),
    "llava": JsonConversations,
    "tfds": TfdsSamples,
}


def open_source(config: SourceConfig) -> Samples:
    """The samples of a source, by index; pickled, it is small (paths, offsets).

    Raises:
      DataError: a task, split, file or directory that is not there or cannot be read, or no samples in it.
    """
    source = OPENERS[config.format](config)
    if not len(source):
        raise DataError(f"source {config} holds no samples")
    return source
