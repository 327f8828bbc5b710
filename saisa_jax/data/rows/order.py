"""The order of samples: a function of seed, epoch and block.

An epoch goes through every source as often as its weight says. Each pass through a source shuffles it again, and
the epoch then shuffles what it takes of all sources together. It does so block by block: an epoch of more samples than
a block holds is parted into blocks with an equal share of every source, and no order is made before its block is
reached. A source that is larger than a block is passed through piece by piece (the files of a prepared set), the pieces
in a shuffled order, so that a block needs few of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from saisa_jax.data.sample import Samples

PIECE = 4096  # samples, of sources that do not say what theirs are


@dataclass(frozen=True)
class Order:
    """Args:
    sizes: samples of each source. A sample's number counts through all sources, in their order.
    weights: how often an epoch goes through each; 0.5: through one half, the next epoch through the other.
    seed: of the stage.
    block: samples that are shuffled together, at most.
    pieces: where the pieces of each source end, its last one with the source; None: every `PIECE` samples.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int
    block: int = 2**20
    pieces: tuple[Int64[np.ndarray, " _"] | None, ...] = ()

    def size(self, epoch: int, block: int | None = None) -> int:
        """Samples of an epoch, or of one of its blocks."""
        return sum(stop - start for start, stop in self._shares(epoch, block))

    def shares(self, epoch: int) -> list[int]:
        """Samples that an epoch takes of each source."""
        return [stop - start for start, stop in self._shares(epoch, None)]

    def blocks(self, epoch: int) -> int:
        """Into how many blocks an epoch is parted."""
        return max(1, -(-self.size(epoch) // self.block))

    def before(self, epoch: int, block: int) -> int:
        """Samples of the epoch's blocks before this one."""
        both = zip(self._shares(epoch, block), self._shares(epoch, None), strict=True)
        return sum(own[0] - whole[0] for own, whole in both)

    def seeds(self, epoch: int, block: int) -> list[int]:
        """What sets the random numbers of a block apart; those of an epoch of one block are the epoch's."""
        return [epoch] if self.blocks(epoch) == 1 else [epoch, block]

    def __call__(self, epoch: int, block: int = 0) -> Int64[np.ndarray, " n"]:
        """The numbers of a block's samples, in the order in which they are read."""
        taken = [self._take(source, start, stop) for source, (start, stop) in enumerate(self._shares(epoch, block))]
        numbers = np.concatenate([*taken, np.zeros(0, np.int64)])
        return numbers[np.random.default_rng([self.seed, *self.seeds(epoch, block)]).permutation(len(numbers))]

    @cached_property
    def _per_epoch(self) -> list[Fraction]:
        """Samples of each source in an epoch, whole or not; reckoned once, as every row asks for its block's size."""
        return [Fraction(str(weight)) * size for size, weight in zip(self.sizes, self.weights, strict=True)]

    def _shares(self, epoch: int, block: int | None) -> list[tuple[int, int]]:
        """Where an epoch, or a block of it, starts and stops in the endless sequence of passes through each source."""
        shares = [(int(per_epoch * epoch), int(per_epoch * (epoch + 1))) for per_epoch in self._per_epoch]
        if block is None:
            return shares
        part = lambda start, stop, number: start + (stop - start) * number // self.blocks(epoch)  # noqa: E731
        return [(part(start, stop, block), part(start, stop, block + 1)) for start, stop in shares]

    def _take(self, source: int, start: int, stop: int) -> Int64[np.ndarray, " n"]:
        size, taken = self.sizes[source], [np.zeros(0, np.int64)]
        for number in range(start // size, -(-stop // size)) if stop > start else ():
            begin, end = max(start - number * size, 0), min(stop - number * size, size)
            taken.append(self._pass(source, number, begin, end))
        return np.concatenate(taken) + sum(self.sizes[:source])

    def _pass(self, source: int, number: int, start: int, stop: int) -> Int64[np.ndarray, " n"]:
        """A part of a pass through a source."""
        size, rng = self.sizes[source], np.random.default_rng([self.seed, 1 + source, number, 1])
        if size <= self.block:
            return rng.permutation(size)[start:stop]
        ends = self.pieces[source] if self.pieces else None
        if ends is None:
            ends = np.append(np.arange(PIECE, size, PIECE), size)
        lengths = np.diff(ends, prepend=0)
        chosen = rng.permutation(len(ends))
        until = np.cumsum(lengths[chosen])  # of the pass
        first, last = (int(np.searchsorted(until, place, side="right")) for place in (start, stop - 1))
        read = chosen[first : last + 1]
        parts = [np.arange(*piece) for piece in zip((ends - lengths)[read].tolist(), ends[read].tolist(), strict=True)]
        begun = start - (int(until[first - 1]) if first else 0)
        return np.concatenate(parts)[begun : begun + stop - start]


class Concatenated:
    """Several sources as one, by the numbers of `Order`."""

    def __init__(self, sources: Sequence[Samples]) -> None:
        self.sources = list(sources)
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number):
        source = int(np.searchsorted(self._ends, number, side="right"))
        return self.sources[source][int(number - (self._ends[source - 1] if source else 0))]

    @property
    def copied(self) -> bool:
        """Whether reading a sample may copy a file to this machine."""
        return any(isinstance(source, KeepsCopies) and source.copied for source in self.sources)

    def expect(self, now: Int64[np.ndarray, " n"], then: Int64[np.ndarray, " m"], room: int | None) -> None:
        """Tells the sources that keep copies of their files which samples are read now, and which then.

        Args:
          now: their numbers, in the order in which they are read.
          then: likewise, of what follows.
          room: `data.cache_bytes`.

        Raises:
          DataError: the files of `now` have no room.
        """
        for source, stop in zip(self.sources, self._ends.tolist(), strict=True):
            if isinstance(source, KeepsCopies):
                start = stop - len(source)
                own = lambda numbers: numbers[(numbers >= start) & (numbers < stop)] - start  # noqa: B023, E731
                source.expect(own(now), own(then), room)


@runtime_checkable
class KeepsCopies(Protocol):
    """A source of files that may have to be copied to this machine to be read."""

    @property
    def copied(self) -> bool:
        """Whether they are."""
        ...

    def expect(self, now: Int64[np.ndarray, " n"], then: Int64[np.ndarray, " m"], room: int | None) -> None:
        """As `Concatenated.expect`, with the source's own numbers."""
        ...
