"""What a source held when a run began, whatever the place that it is read from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath

from saisa_jax.config import SourceConfig
from saisa_jax.data.sample import DataError, Samples


def content_mark(samples: Samples, source: SourceConfig) -> str:
    """A hash of all that a source says, as KIND:HASH; of pictures, how many a sample has.

    It is what the source's own `content()` tells (of the checksums in its files, say), a hash of its file (without a
    kind), or one of every sample.
    """
    own = getattr(samples, "content", None)
    if own is not None:
        return own()
    path = epath.Path(source.path) if source.path else None
    if path is not None and path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]  # type: ignore[arg-type]
    digest = hashlib.sha256()
    for number in range(len(samples)):
        try:
            sample = samples[number]
        except DataError:
            digest.update(b"unusable")
        else:
            turns = [(turn.role, turn.text, turn.loss) for turn in sample.turns]
            digest.update(repr((sample.id, turns, sample.system, len(sample.images))).encode("utf-8", "surrogatepass"))
    return f"samples:{digest.hexdigest()[:16]}"


def same_content(before: Sequence[str], now: Sequence[str]) -> bool:
    """Whether marks of the same sources are of the same content.

    Marks of two kinds cannot be compared, and are taken as the same: an earlier version looked at 256 samples of what
    was not a file, and made a mark without a kind of them. (What lengths hash to is compared beside.)
    """
    pairs = [(one.rpartition(":"), other.rpartition(":")) for one, other in zip(before, now, strict=True)]
    return all(one[0] != other[0] or one[2] == other[2] for one, other in pairs)


def counts_mark(counts: Iterable[np.ndarray]) -> str:
    """A hash of what rows are planned by."""
    digest = hashlib.sha256()
    for part in counts:
        for first in range(0, len(part), 2**22):  # a copy of all would be large
            digest.update(np.ascontiguousarray(part[first : first + 2**22], np.int32).tobytes())
    return digest.hexdigest()[:16]
