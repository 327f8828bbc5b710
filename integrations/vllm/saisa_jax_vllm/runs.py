"""What front and connector say to each other: the places of a prompt that vLLM does not compute.

A prompt, up to the end of its last picture, is a list of runs: pictures, and the text before and between them. Of each
the store holds keys and values, under a key that says all that they depend on. vLLM's cache is a sequence, so the text
in front of a picture has to be there as well when the picture is.

A request to vLLM carries `kv_transfer_params: {"saisa": {"runs": [[KEY, PLACES], ...]}}`. Neither torch, nor vLLM, nor
saisa_jax is imported here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FIELD = "saisa"  # of kv_transfer_params
KEY = re.compile(r"[0-9a-f]{32}")  # it becomes a file's name


class RunsError(ValueError):
    """kv_transfer_params that this connector does not read."""


@dataclass(frozen=True)
class Run:
    """Some places of a prompt, one after the other, whose keys and values the store holds.

    Attributes:
      key: a hash of all that they depend on: the model, and of a picture its pixels and position; of text everything
        in front of it.
      places: how many.
    """

    key: str
    places: int


@dataclass(frozen=True)
class Part:
    """A stretch of a run: its places from `first` to `last`, of which the first is the prompt's `place`."""

    key: str
    first: int
    last: int
    place: int


def digest(*parts: Any) -> str:
    """A key."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def to_params(runs: Sequence[Run]) -> dict[str, Any]:
    """As kv_transfer_params."""
    return {FIELD: {"runs": [[run.key, run.places] for run in runs]}}


def from_params(params: Mapping[str, Any] | None) -> tuple[Run, ...]:
    """The runs of a request; (): it has none.

    Raises:
      RunsError: they are not as `to_params` writes them.
    """
    said = (params or {}).get(FIELD)
    if said is None:
        return ()
    try:
        runs = tuple(Run(str(key), int(places)) for key, places in said["runs"])
    except (TypeError, KeyError, ValueError) as error:
        raise RunsError(f"kv_transfer_params.{FIELD} is {{'runs': [[KEY, PLACES], ...]}}, not {said!r}") from error
    if wrong := [run for run in runs if not KEY.fullmatch(run.key) or run.places < 1]:
        raise RunsError(f"kv_transfer_params.{FIELD} has a run that is none: {wrong[0]}")
    return runs


def length(runs: Iterable[Run]) -> int:
    """Places of all runs."""
    return sum(run.places for run in runs)


def parts_from(runs: Sequence[Run], start: int) -> Iterator[Part]:
    """What is to be loaded when the first `start` places are in the cache already."""
    begin = 0
    for run in runs:
        first = max(0, start - begin)
        if first < run.places:
            yield Part(run.key, first, run.places, begin + first)
        begin += run.places


def slots(blocks: Sequence[int], block_size: int, place: int, count: int) -> list[int]:
    """Where places of a sequence lie in a paged cache: a block's number times its size, and the place in the block."""
    return [blocks[at // block_size] * block_size + at % block_size for at in range(place, place + count)]


def kv_heads_of(rank: int, size: int, total: int) -> range:
    """Which of `total` heads of keys the process `rank` of `size` holds: its share, or one that others hold as well."""
    count = max(1, total // size)
    first = rank * total // size
    return range(first, first + count)
