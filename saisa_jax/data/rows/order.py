"""The order of samples: a function of seed and epoch.

An epoch goes through every source as often as its weight says. Each pass through a source shuffles it again, and
the epoch then shuffles what it takes of all sources together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from jaxtyping import Int64

from saisa_jax.data.sample import Samples


@dataclass(frozen=True)
class Order:
    """Args:
    sizes: samples of each source. A sample's number counts through all sources, in their order.
    weights: how often an epoch goes through each; 0.5: through one half, the next epoch through the other.
    seed: of the stage.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    def size(self, epoch: int) -> int:
        """Samples of an epoch."""
        return sum(stop - start for start, stop in map(self._share, range(len(self.sizes)), [epoch] * len(self.sizes)))

    def __call__(self, epoch: int) -> Int64[np.ndarray, " n"]:
        """The numbers of an epoch's samples, in the order in which they are read."""
        taken = [self._take(source, epoch) for source in range(len(self.sizes))]
        numbers = np.concatenate([*taken, np.zeros(0, np.int64)])
        return numbers[np.random.default_rng([self.seed, epoch]).permutation(len(numbers))]

    def _share(self, source: int, epoch: int) -> tuple[int, int]:
        """Where an epoch starts and stops in the endless sequence of passes through a source."""
        per_epoch = Fraction(str(self.weights[source])) * self.sizes[source]
        return int(per_epoch * epoch), int(per_epoch * (epoch + 1))

    def _take(self, source: int, epoch: int) -> Int64[np.ndarray, " n"]:
        size, (start, stop) = self.sizes[source], self._share(source, epoch)
        if start == stop:
            return np.zeros(0, np.int64)
        passes = [
            np.random.default_rng([self.seed, 1 + source, number, 1]).permutation(size)
            for number in range(start // size, (stop - 1) // size + 1)
        ]
        first = start // size * size
        return np.concatenate(passes)[start - first : stop - first] + sum(self.sizes[:source])


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
