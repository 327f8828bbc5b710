"""Times of calls, and of what the machine did besides: wall time, processor time, and what other programs took.

Things that are compared alternate in one run, each round in reverse order, so that other load on the machine affects
all alike; a ratio is the median over the rounds of that of the two times of a round. Processor time, of all threads of
this process together, hardly changes with other load; wall time is what a user waits for.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Of the cores' time: more than this taken by others, and wall times say nothing of a program.
MOST_BY_OTHERS = 0.05
LEAST_OF_CORES = 0.9  # that a product of large matrices keeps busy where nobody else does
_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Timed:
    """One thing's calls.

    Attributes:
      flops: that a call needs; 0: not counted.
      seconds: of each call, wall time, until its arrays are ready.
      processor: of each call, of all threads of this process together.
    """

    flops: float = 0.0
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def add(self, call: Callable[[], Any], per: int = 1) -> None:
        """Times a call; `per` things that it does count one by one."""
        wall, processor = time.perf_counter(), time.process_time()
        jax.block_until_ready(call())
        self.seconds.append((time.perf_counter() - wall) / per)
        self.processor.append((time.process_time() - processor) / per)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def processor_median(self) -> float:
        return statistics.median(self.processor)

    @property
    def spread(self) -> float:
        """The middle half of the seconds, as a share of their median."""
        low, high = middle(self.seconds)
        return (high - low) / self.median


def in_turns(calls: Mapping[str, Callable[[], Any]], rounds: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The calls of all rounds, every second round from the last to the first."""
    for number in range(rounds):
        yield from reversed(list(calls.items())) if number % 2 else calls.items()


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Round by round."""
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def middle(values: Sequence[float]) -> tuple[float, float]:
    """Where the middle half begins and ends."""
    low, high = np.percentile(values, [25, 75]).tolist()
    return low, high


# --- the machine ------------------------------------------------------------------------------------------------------


def cores() -> int:
    """That this process may use: as many threads as both libraries get."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Watch:
    """What others took of the machine, from `start` to `stop`.

    Attributes:
      others: a share of the time of all cores, steal of a virtual machine's host included; None: the system does not
        say (it is no Linux).
      load_before, load_after: the load of a minute, in which this program is as well.
    """

    def __init__(self) -> None:
        self.others: float | None = None
        self.start()

    def start(self) -> None:
        self.load_before = self.load_after = os.getloadavg()[0]
        self._start = _busy_seconds(), time.process_time(), time.perf_counter()

    def stop(self) -> Watch:
        busy, own, now = self._start
        self.load_after = os.getloadavg()[0]
        if busy is not None and (ended := _busy_seconds()) is not None:
            every = (time.perf_counter() - now) * (os.cpu_count() or 1)
            self.others = max(0.0, (ended - busy) - (time.process_time() - own)) / every
        return self

    def says(self) -> dict[str, Any]:
        return {"load_before": self.load_before, "load_after": self.load_after, "others": self.others}


def _busy_seconds() -> float | None:
    """Of all cores together since the machine started."""
    if not _STAT.exists():
        return None
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, _STAT.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


class Machine(NamedTuple):
    """What this machine can do, measured: FLOP/s of a large product, bytes/s of memory, and the cores that it got."""

    flops: float
    bandwidth: float
    of_cores: float | None  # processor time over wall time and cores, of the product; None on accelerators

    @property
    def quiet(self) -> bool:
        return self.of_cores is None or self.of_cores >= LEAST_OF_CORES


def measure_machine(
    dtype: str, products: Iterable[Callable[[int], Callable[[], Any]]] = (), repeat: int = 5, size: int = 0
) -> Machine:
    """The peaks of the default device.

    Args:
      dtype: of the operands.
      products: other libraries' products of square matrices, made for a size; the fastest of all counts.
      repeat: calls of each.
      size: of the matrices; 0: large.
    """
    on_cpu = jax.default_backend() == "cpu"
    size = size or (2048 if on_cpu else 8192)
    product, add = jax.jit(lambda a, b: a @ b), jax.jit(lambda a: a + 1, donate_argnums=0)
    square = jnp.ones((size, size), dtype)
    calls = [lambda: product(square, square), *(make(size) for make in products)]
    timed = [_after_one(call, repeat) for call in calls]
    # In place: new memory would be measured by how fast the system hands it out. Beyond the caches.
    held = [jnp.ones(8 * size**2, jnp.float32)]
    moved = _after_one(lambda: held.append(add(held.pop())) or held[0], repeat)
    shares = [statistics.median(ratios(one.processor, one.seconds)) / cores() for one in timed]
    flops = max(2 * size**3 / min(one.seconds) for one in timed)
    return Machine(flops, 2 * held[0].nbytes / min(moved.seconds), max(shares) if on_cpu else None)


def _after_one(call: Callable[[], Any], repeat: int) -> Timed:
    jax.block_until_ready(call())
    timed = Timed()
    for _ in range(repeat):
        timed.add(call)
    return timed


def why_busy(machine: Machine, watched: Iterable[Watch]) -> str:
    """Why nothing should be concluded from times; "" if the machine was quiet."""
    if not machine.quiet:
        return (
            f"a product of large matrices got {machine.of_cores:.0%} of {cores()} cores, and on a quiet machine gets "
            f"at least {LEAST_OF_CORES:.0%}"
        )
    most = max((watch.others or 0.0 for watch in watched), default=0.0)
    if most > MOST_BY_OTHERS:
        return f"other programs took {most:.0%} of the cores' time, of {MOST_BY_OTHERS:.0%} that they may"
    return ""
