"""Sources of samples by `format`: sequences that are read at random and can be handed to another process.

A source is what makes `Samples` (`data/sample.py`) of a `SourceConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from absl import logging

from saisa_jax.config import SourceConfig
from saisa_jax.data.sample import DataError, Samples
from saisa_jax.registry import Registry

SOURCES: Registry[Callable[[SourceConfig], Samples]] = Registry("sources.format", __name__)


def open_source(config: SourceConfig) -> Samples:
    """The samples of a source, by index; pickled, it is small (paths, offsets).

    Raises:
      UnknownNameError: an unknown format.
      DataError: a task, split, file or directory that is not there or cannot be read, or no samples in it.
    """
    source = SOURCES[config.format](config)
    if not len(source):
        raise DataError(f"source {config} holds no samples")
    return source


def warn_of_text_alone(opened: Sequence[Samples], sources: Sequence[SourceConfig], look_at: int = 256) -> None:
    """Says in the log which sources seem to have no picture at all, from `look_at` samples spread over each."""
    for samples, config in zip(opened, sources, strict=True):
        seen = 0
        for number in np.unique(np.linspace(0, len(samples) - 1, look_at).astype(int)):
            try:
                if samples[int(number)].images:
                    break
            except DataError:  # it is told of where the sample is used
                continue
            seen += 1
        else:
            if seen:
                logging.warning(
                    "source %s: none of %s samples that were looked at has a picture: it is text alone", config, seen
                )
