"""What a source held when a run began, whatever the place that it is read from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from etils import epath

from saisa_jax.config import SourceConfig
from saisa_jax.data.sample import DataError, Samples

_LOOKED_AT = 256  # samples of a source that is not one file


def content_mark(samples: Samples, source: SourceConfig) -> str:
    """A hash of a source's file; of one that is not a file, of `_LOOKED_AT` samples spread over it (id, turns)."""
    digest = hashlib.sha256()
    for part in _parts(samples, source):
        digest.update(part)
    return digest.hexdigest()[:16]


def _parts(samples: Samples, source: SourceConfig) -> Iterable[bytes]:
    path = epath.Path(source.path) if source.path else None
    if path is not None and path.is_file():
        with path.open("rb") as file:
            while part := file.read(2**22):
                yield part
        return
    for number in np.unique(np.linspace(0, len(samples) - 1, _LOOKED_AT).astype(int)).tolist():
        try:
            sample = samples[number]
        except DataError:
            yield b"unusable"
        else:
            turns = [(turn.role, turn.text, turn.loss) for turn in sample.turns]
            yield repr((sample.id, turns, sample.system, len(sample.images))).encode()


def counts_mark(counts: Iterable[np.ndarray]) -> str:
    """A hash of what rows are planned by."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(part, np.int32).tobytes() for part in counts)).hexdigest()[:16]
