"""Sources of samples by `format`: sequences that are read at random and can be handed to another process.

A source is what makes `Samples` (`data/sample.py`) of a `SourceConfig`.
"""

from __future__ import annotations

from collections.abc import Callable

from saisa_jax.config import SourceConfig
from saisa_jax.data.sample import DataError, Samples
from saisa_jax.registry import Registry

SOURCES: Registry[Callable[[SourceConfig], Samples]] = Registry("sources.format", __name__)


def open_source(config: SourceConfig) -> Samples:
    """The samples of a source, by index; pickled, it is small (paths, offsets).

    Raises:
      UnknownNameError: a format that nobody reads.
      DataError: a task, split, file or directory that is not there or cannot be read, or no samples in it.
    """
    source = SOURCES[config.format](config)
    if not len(source):
        raise DataError(f"source {config} holds no samples")
    return source
