"""Counting the text tokens and images of samples: in parts, by several processes, and kept as it goes.

    counts-KEY.npz               what was counted, of a whole source
    counts-KEY.parts/00007.npz   while it is being counted: samples 7 * PART ... 8 * PART - 1

A start counts the parts that are not there. Of several processes of a run, each begins with its own share, and then
takes what is left of the others', the last parts first: so none waits for another, and if they do not see each other's
files, each counts all of it. Two that count the same part find the same.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Int32, Int64

from saisa_jax import buckets
from saisa_jax.data.images import missing_image
from saisa_jax.data.rows.unusable import SHOWN
from saisa_jax.data.sample import DataError, EmptyAnswerError, Samples
from saisa_jax.data.text.encoder import Encoder
from saisa_jax.data.workers import available_cores, worker_pool

PART = 4096  # samples; a few seconds of one core
_WORTH_WORKERS = 4 * PART  # samples; a worker takes some seconds to start
_MOST_WORKERS = 16  # a worker takes some 300 MB
_SECONDS_BETWEEN_LINES = 10
_SECONDS_TO_STOP = 0.2

Task = tuple[int, Int64[np.ndarray, " _"]]  # a part's number, and the samples that are counted of it


class CountingStopped(Exception):
    """It was asked to stop; what was counted is kept."""


@dataclass(frozen=True)
class Effort:
    """Who counts.

    Args:
      process: this one's number among the `processes` of a run, which share the work.
      processes: of the run.
      workers: processes that this one starts; None: as many as there are cores, where that is worth it.
      stopped: asked several times a second.
    """

    process: int = 0
    processes: int = 1
    workers: int | None = None
    stopped: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Part:
    """What was counted of some samples."""

    tokens: Int32[np.ndarray, " n"]  # of text, in full length; 0: cannot be used, or has an empty answer
    images: Int32[np.ndarray, " n"]
    unusable: Int64[np.ndarray, " m"]  # the numbers of those that cannot be used
    first: tuple[str, ...]  # the first of them in words
    empty: int  # those with an empty answer
    first_empty: tuple[str, ...]


def count(
    samples: Samples,
    encoder: Encoder,
    numbers: Int64[np.ndarray, " n"] | None = None,
    stopped: Callable[[], bool] = lambda: False,
    tick: Callable[[], object] = lambda: None,
) -> Part:
    """Counts samples; no image is decoded, but each has to be there.

    Args:
      samples: of a source.
      encoder: of the stage.
      numbers: which samples; None: all.
      stopped: asked several times a second.
      tick: called after each sample.

    Raises:
      CountingStopped: it was asked to.
    """
    files, blind = _Files(), encoder.config.data.blind
    tokens, images, unusable, first, empty, first_empty = [], [], [], [], 0, []
    asked = time.monotonic()
    for number in range(len(samples)) if numbers is None else numbers.tolist():
        if time.monotonic() - asked > _SECONDS_TO_STOP:
            asked = time.monotonic()
            if stopped():
                raise CountingStopped
        size = 0, 0
        try:
            sample = samples[number]
            encoded = encoder.whole(sample)
            for image in () if blind else sample.images:
                if isinstance(image, str | os.PathLike) and image not in files:
                    raise missing_image(os.fspath(image), sample.id)
            size = len(encoded.tokens), len(encoded.image_positions)
        except EmptyAnswerError as error:
            empty += 1
            first_empty += [str(error)][: SHOWN - len(first_empty)]
        except DataError as error:
            unusable.append(number)
            first += [str(error)][: SHOWN - len(first)]
        tokens.append(size[0])
        images.append(size[1])
        tick()
    found = np.array(tokens, np.int32), np.array(images, np.int32), np.array(unusable, np.int64)
    return Part(*found, tuple(first), empty, tuple(first_empty))


def join(parts: Sequence[Part]) -> Part:
    """Parts in their order as one."""
    tokens, images, unusable = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("tokens", "images", "unusable")
    )
    first, first_empty = (
        tuple(said for part in parts for said in getattr(part, name))[:SHOWN] for name in ("first", "first_empty")
    )
    return Part(tokens, images, unusable, first, sum(part.empty for part in parts), first_empty)


def counted(samples: Samples, encoder: Encoder, effort: Effort, kept: epath.Path | None = None) -> Part:
    """The counts of a source: of what is kept, or counted now.

    What could not be used is looked at again at each start, since it may have been mended; with `data.on_error=drop`
    only once, so that a run goes on with the rows that it began with.

    Args:
      samples: of the source.
      encoder: of the stage.
      effort: who counts.
      kept: the file of the source's counts; None: nothing is kept.

    Raises:
      CountingStopped: it was asked to.
    """
    counter, on_error = _Counter(samples, encoder, effort), encoder.config.data.on_error
    if kept is None:
        tasks = _tasks(np.arange(len(samples)))
        return join([part for _, part in sorted(counter.run(iter(tasks), len(samples)), key=_number)])
    found = _read(kept)
    if found is None:
        whole, look_again = _in_parts(counter, kept)
        settled = ""
    else:
        whole, settled = found
        look_again = not on_error == settled == "drop"
    again = whole.unusable
    if look_again and len(again):
        looked_at = counter.run(iter(_tasks(again)), len(again))
        whole = _mended(whole, join([part for _, part in sorted(looked_at, key=_number)]))
    if settled != on_error or look_again:
        _write(kept, whole, on_error)
    buckets.remove(_folder(kept))
    return whole


# --- Parts -----------------------------------------------------------------------------------------------------------


def _tasks(numbers: Int64[np.ndarray, " n"]) -> list[Task]:
    return [(place // PART, numbers[place : place + PART]) for place in range(0, len(numbers), PART)]


def _number(numbered: tuple[int, Part]) -> int:
    return numbered[0]


def _folder(kept: epath.Path) -> epath.Path:
    return kept.parent / f"{kept.name.removesuffix('.npz')}.parts"


def _in_parts(counter: _Counter, kept: epath.Path) -> tuple[Part, bool]:
    """The counts of a source, and whether some could not be used when another start or process counted them."""
    folder, effort, tasks = _folder(kept), counter.effort, _tasks(np.arange(len(counter.samples)))
    name = "{:05d}.npz".format
    there = {path.name for path in buckets.children(folder)}
    parts: dict[int, Part] = {}
    look_again = False

    def missing() -> Iterator[Task]:
        nonlocal look_again
        for number in _own_first(len(tasks), effort):
            stored = _read(folder / name(number)) if name(number) in there or effort.processes > 1 else None
            if stored is None:
                yield tasks[number]
            else:
                parts[number] = stored[0]
                look_again |= len(stored[0].unusable) > 0
                counter.progress.add(len(tasks[number][1]), counted=False)

    left = max(0, len(tasks) // effort.processes - len(there)) * PART
    for number, part in counter.run(missing(), left):
        parts[number] = part
        _write(folder / name(number), part, "")
    return join([part for _, part in sorted(parts.items())]), look_again


def _own_first(parts: int, effort: Effort) -> Iterator[int]:
    """All parts: this process's share, then those of the others, beginning with the next one's last."""
    for ahead in range(effort.processes):
        owner = (effort.process + ahead) % effort.processes
        share = range(owner * parts // effort.processes, (owner + 1) * parts // effort.processes)
        yield from reversed(share) if ahead else share


def _mended(whole: Part, part: Part) -> Part:
    """Counts, with what was found now of the samples that could not be used."""
    tokens, images = whole.tokens.copy(), whole.images.copy()
    tokens[whole.unusable], images[whole.unusable] = part.tokens, part.images
    empty, first_empty = whole.empty + part.empty, (whole.first_empty + part.first_empty)[:SHOWN]
    return Part(tokens, images, part.unusable, part.first, empty, first_empty)


def _read(path: epath.Path) -> tuple[Part, str] | None:
    """What `_write` wrote; None if it is not there."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    with np.load(io.BytesIO(content)) as stored:
        tokens, images, unusable = (stored[name] for name in ("tokens", "images", "unusable"))
        first, first_empty = (tuple(stored[name].tolist()) for name in ("first", "first_empty"))
        part = Part(tokens, images, unusable, first, int(stored["empty"]), first_empty)
        return part, str(stored["on_error"])


def _write(path: epath.Path, part: Part, on_error: str) -> None:
    """Keeps counts, and which `data.on_error` they were looked at for last; the file is whole at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields: dict[str, Any] = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    fields |= {name: np.array(fields[name], np.str_) for name in ("first", "first_empty")}
    content = io.BytesIO()
    np.savez(content, on_error=np.array(on_error), **fields)
    if buckets.is_remote(path):
        path.write_bytes(content.getvalue())
        return
    half = path.parent / f".{path.name}.{secrets.token_hex(4)}"  # other processes may count at the same time
    half.write_bytes(content.getvalue())
    half.replace(path)


# --- Processes -------------------------------------------------------------------------------------------------------


@dataclass
class _Progress:
    """A line now and then: how many of all, how fast, and the time left."""

    stage: str
    total: int
    processes: int
    done: int = 0
    counted: int = 0  # by this process and its workers
    began: float = dataclasses.field(default_factory=time.monotonic)
    told: float = dataclasses.field(default_factory=time.monotonic)

    def add(self, samples: int = 1, counted: bool = True) -> None:
        self.done += samples
        self.counted += samples * counted
        self.tell()

    def tell(self) -> None:
        now = time.monotonic()
        if now - self.told < _SECONDS_BETWEEN_LINES or not self.counted:
            return
        self.told = now
        rate = self.counted / (now - self.began) * self.processes
        logging.info(
            "%s: counting tokens, %s of %s samples, %s a second, %.1f minutes left",
            self.stage,
            f"{self.done:,}",
            f"{self.total:,}",
            f"{rate:,.0f}",
            max(0, self.total - self.done) / rate / 60,
        )


class _Counter:
    """Counts samples of a source, in worker processes where there are many of them."""

    def __init__(self, samples: Samples, encoder: Encoder, effort: Effort) -> None:
        self.samples, self.encoder, self.effort = samples, encoder, effort
        self.progress = _Progress(encoder.stage, len(samples), effort.processes)

    def run(self, tasks: Iterator[Task], size: int) -> Iterator[tuple[int, Part]]:
        """The counts of each task, in any order.

        Args:
          tasks: asked for the next one when there is room for it.
          size: about how many samples they have.

        Raises:
          CountingStopped: it was asked to.
        """
        workers = self.effort.workers
        if workers is None:
            workers = min(available_cores(), _MOST_WORKERS, -(-size // PART)) if size >= _WORTH_WORKERS else 1
        try:
            lost: list[Task] = []
            if workers > 1:
                logging.info(
                    "%s: %d processes count the tokens of %s samples", self.encoder.stage, workers, f"{size:,}"
                )
                yield from self._in_workers(tasks, workers, lost)
            for number, numbers in itertools.chain(lost, tasks):
                yield number, count(self.samples, self.encoder, numbers, self.effort.stopped, self.progress.add)
        except CountingStopped:
            logging.warning(
                "%s: stopped when %s of %s samples were counted; the same command goes on from there",
                self.encoder.stage,
                f"{self.progress.done:,}",
                f"{self.progress.total:,}",
            )
            raise

    def _in_workers(self, tasks: Iterator[Task], workers: int, lost: list[Task]) -> Iterator[tuple[int, Part]]:
        """As `run`. When a worker was killed, what they had begun is added to `lost`."""
        pending: dict[Future[Part], Task] = {}
        with worker_pool(workers, _start_worker, self.samples, self.encoder) as pool:
            while True:
                while len(pending) <= workers and (task := next(tasks, None)) is not None:
                    try:
                        pending[pool.submit(_work, task[1])] = task
                    except BrokenProcessPool:
                        lost.append(task)
                        break
                if not pending:
                    return
                done, _ = wait(pending, timeout=_SECONDS_TO_STOP, return_when=FIRST_COMPLETED)
                if self.effort.stopped():
                    raise CountingStopped
                self.progress.tell()
                for future in done:
                    number, numbers = pending.pop(future)
                    try:
                        part = future.result()
                    except BrokenProcessPool:
                        lost += [(number, numbers), *pending.values()]
                        logging.warning(
                            "%s: a worker was killed (out of memory?); one process goes on", self.encoder.stage
                        )
                        return
                    self.progress.add(len(numbers))
                    yield number, part


_worker: dict[str, Any] = {}  # what a worker process was started with


def _start_worker(stop: Any, samples: Samples, encoder: Encoder) -> None:
    _worker.update(stop=stop, samples=samples, encoder=encoder)


def _work(numbers: Int64[np.ndarray, " n"]) -> Part:
    return count(_worker["samples"], _worker["encoder"], numbers, _worker["stop"].is_set)


class _Files:
    """Which files are there, by one listing of each folder: a network's disk takes long to answer for each of them."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}

    def __contains__(self, path: str | os.PathLike[str]) -> bool:
        folder, name = os.path.split(os.fspath(path))
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(os.listdir(folder))
            except OSError:
                self._names[folder] = frozenset()
        return name in self._names[folder] or os.path.exists(path)
