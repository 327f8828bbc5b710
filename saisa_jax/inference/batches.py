"""Many questions, answered batch by batch, by all processes that share a model's mesh.

Every process makes the same plan from the prompts' lengths and the pictures' names, and runs the same programs in the
same order; each reads the pictures of its own rows alone. The answers of a batch reach every process through the
devices, so that nothing needs a common disk.

Prompts are sorted by their buckets of length and of image slots, and within these by picture. What a text reads of a
picture (keys and values; under LLaVA the features) stays on the devices that hold its rows, in a ring of slots: the
next questions about it find it there. While a batch is computed, the pictures of the next one are read. Of a picture
of several views (`data/views.py`) each takes a slot by itself.

Axes: B rows of a batch, W ways (devices along "data" and "fsdp") over which they are split, b = B / W, E pictures that
a way encodes at once, C slots of its ring.
"""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from saisa_jax import parallel
from saisa_jax.data.images import image_name
from saisa_jax.data.rows.collate import Example, pack_rows
from saisa_jax.data.sample import DataError
from saisa_jax.data.text.conversation import Encoded
from saisa_jax.inference.generate import bucket
from saisa_jax.inference.memory import picture_bytes
from saisa_jax.inference.model import Conversation, VisionLanguageModel
from saisa_jax.inference.programs import programs_of

MOST_AT_ONCE = 16  # pictures that a way encodes in one program
REASON_BYTES = 400  # of why a row has no answer, as it travels between processes


@dataclass(frozen=True)
class Prompt:
    """A question as the model reads it: text, and where its pictures come from."""

    encoded: Encoded
    images: tuple[Any, ...] = ()

    @functools.cached_property
    def keys(self) -> tuple[str, ...]:
        """Names of what its image slots hold, the same in every process: pictures, or the views of each."""
        return tuple(
            f"{image_name(image)}{f' view {n}' if n else ''}"
            for image, views in zip(self.images, self.encoded.views, strict=True)
            for n in range(views)
        )


def make_prompt(model: VisionLanguageModel, asked: Conversation, max_new_tokens: int) -> Prompt:
    """A conversation as the model reads it; its pictures are not looked at, but for their size where that counts.

    Raises:
      DataError: it is empty, too long, or does not fit its pictures; or the model has no eyes.
    """
    model.check_sees(asked.images, asked.name)
    views = model.views_of(asked.images, asked.name)
    return Prompt(model.prompt(asked.turns, views, max_new_tokens, asked.name, asked.system), asked.images)


def plan_batches(prompts: Sequence[Prompt], size: int, ways: int = 1) -> list[list[int | None]]:
    """Which prompts are answered together: their numbers, the rows of each way beside each other; None: padding.

    Short prompts come first. What does not fill a batch of one bucket goes into the first of the next one, so that only
    the last batch has padding. Within a bucket each way gets a contiguous part of the pictures.

    Args:
      prompts: in any order; equal ones give an equal plan.
      size: rows of a batch; a multiple of `ways`.
    """
    first_seen: dict[tuple[str, ...], int] = {}
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        first_seen.setdefault(prompt.keys, number)
        groups[bucket(len(prompt.encoded.tokens)), _slots(len(prompt.keys))].append(number)
    batches: list[list[int | None]] = []
    waiting: list[int] = []
    for _, numbers in sorted(groups.items()):
        waiting += sorted(numbers, key=lambda number: (first_seen[prompts[number].keys], number))
        count = len(waiting) // size
        striped = np.reshape(waiting[: count * size], (ways, count, size // ways)).swapaxes(0, 1)
        batches += striped.reshape(count, size).tolist()
        waiting = waiting[count * size :]
    if waiting:
        each, more = divmod(len(waiting), ways)
        last: list[int | None] = []
        for way in range(ways):
            some = waiting[len(last) - last.count(None) :][: each + (way < more)]
            last += [*some, *[None] * (size // ways - len(some))]
        batches.append(last)
    return batches


def _slots(images: int) -> int:
    return bucket(images, smallest=1) if images else 0


# --- the ring of pictures --------------------------------------------------------------------------------------------


class Ring(NamedTuple):
    """What a way encodes, and when: picture number i of `stream` lies in slot i % C.

    `ends[t]`: how many must be encoded before batch t; `places[t]`: {key: number in the stream} of its pictures.
    """

    stream: list[str]
    ends: list[int]
    places: list[dict[str, int]]


def simulate(needs: Sequence[Sequence[str]], capacity: int) -> Ring:
    """A way's ring, for the pictures that it needs batch by batch, if it holds those of the last `capacity` numbers.

    `capacity` is at least the number of pictures of any batch.
    """
    stream: list[str] = []
    latest: dict[str, int] = {}
    ring = Ring(stream, [], [])
    for keys in needs:
        # Those that are encoded now may push out others of the same batch.
        while missing := [key for key in dict.fromkeys(keys) if latest.get(key, -1) < max(0, len(stream) - capacity)]:
            for key in missing:
                latest[key] = len(stream)
                stream.append(key)
        ring.ends.append(len(stream))
        ring.places.append({key: latest[key] for key in keys})
    return ring


def schedule(rings: Sequence[Ring], at_once: int) -> list[list[list[tuple[int, int]]]]:
    """[batch][call][way]: the part (start, stop) of its stream that a way encodes in a call before a batch.

    A way that has enough for the batch encodes ahead, at most 2 E - 1 pictures, so that calls are full. Only the last
    call of a way may be short, so that each starts at a multiple of E.
    """
    sent = [0] * len(rings)
    batches = []
    for batch in range(len(rings[0].ends)):
        calls = []
        while any(done < ring.ends[batch] for done, ring in zip(sent, rings, strict=True)):
            call = []
            for way, ring in enumerate(rings):
                start = sent[way]
                wanted = start < ring.ends[batch] + at_once
                sent[way] = min(start + at_once, len(ring.stream)) if wanted else start
                call.append((start, sent[way]))
            calls.append(call)
        batches.append(calls)
    return batches


# --- answering -------------------------------------------------------------------------------------------------------


class _Prepared(NamedTuple):
    """A batch as this process reads it: its own rows and ways."""

    calls: list[tuple[Any, Any]]  # pixels [own W, E, size, size, 3], the first of their slots [own W]
    batch: Any
    slots: Any  # [own B, M]
    bad: dict[int, str]  # own rows that cannot be answered, and why


class _Sent(NamedTuple):
    """A batch that the devices work on."""

    number: int
    tokens: Any  # [B, capacity]
    words: Any  # [2, B]: whether a row is bad; whether somebody wants to stop
    bad: dict[int, str]


@dataclass
class Answerer:
    """Answers prompts by a plan.

    Args:
      model: on any mesh; all processes of the mesh make the same one.
      prompts: all of them, in every process.
      batches: of `plan_batches`, for `model.row_ways`.
      max_new_tokens: of an answer.
      cache_bytes: of what is kept of pictures, on each device.
      stop: whether this process was asked to stop; asked once a batch. All of them stop together.
      watch: called with (what was just done, its result): "host" when a batch has been read, "encode" and "answer" when
        programs have been started, "receive" when answers are here. For `bench eval`, which waits in it.
    """

    model: VisionLanguageModel
    prompts: Sequence[Prompt]
    batches: Sequence[Sequence[int | None]]
    max_new_tokens: int
    cache_bytes: int
    stop: Callable[[], bool] = lambda: False
    watch: Callable[[str, Any], None] = lambda what, result: None

    def __post_init__(self) -> None:
        model = self.model
        self._ways = model.row_ways
        self._size = len(self.batches[0]) if self.batches else self._ways
        self._blind = model.config.data.blind
        mesh = model.mesh
        self._own_ways = tuple(range(self._ways)) if mesh is None else parallel.own_rows(mesh, self._ways)
        self._bad: dict[str, str] = {}  # views that this process could not read, and why
        self._programs = programs_of(model.generator, mesh, self._ways, self.max_new_tokens)
        self._plan_pictures()

    def _plan_pictures(self) -> None:
        needs: list[list[list[str]]] = [[] for _ in range(self._ways)]  # [way][batch]
        each = self._size // self._ways
        for numbers in self.batches:
            for way, of_way in enumerate(needs):
                rows = [self.prompts[n] for n in numbers[way * each : (way + 1) * each] if n is not None]
                of_way.append([] if self._blind else list(dict.fromkeys(key for row in rows for key in row.keys)))
        most = max((len(keys) for of_way in needs for keys in of_way), default=0)
        if most == 0:
            self._rings, self._calls, self._at_once, self._capacity = [], [[] for _ in self.batches], 0, 0
            return
        different = max(len({key for keys in of_way for key in keys}) for of_way in needs)
        self._at_once = min(MOST_AT_ONCE, bucket(-(-different // len(self.batches)), smallest=1))
        ahead = 2 * self._at_once
        fits = self.cache_bytes // picture_bytes(self.model.model_config, self.model.mesh)
        whole = lambda pictures: -(-pictures // self._at_once) * self._at_once  # noqa: E731, calls fill E slots in a row
        self._capacity = max(whole(most + ahead), min(whole(different + ahead), fits // self._at_once * self._at_once))
        self._rings = [simulate(of_way, self._capacity - ahead) for of_way in needs]
        self._calls = schedule(self._rings, self._at_once)
        self._sources: dict[str, tuple[str, Any, int]] = {}  # of each view: its picture's name, the picture, its place
        for prompt in self.prompts:
            keys = iter(prompt.keys)
            for image, views in zip(prompt.images, prompt.encoded.views, strict=True):
                names = [next(keys) for _ in range(views)]
                self._sources |= {name: (names[0], image, n) for n, name in enumerate(names)}

    def _empty_pool(self) -> Any:
        """A ring of slots for every way: leaves [A, W, C, ...]."""
        abstract = self._programs.pool(self.model.model_config, self.model.params, self._capacity)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), abstract)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[list[list[int] | DataError | None]]:
        """Tokens of every row of a batch after the other; a DataError where a picture cannot be read; None: padding.

        Ends early if a process was asked to stop.
        """
        if not self.batches:
            return
        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as readers:
            pool = self._empty_pool() if self._rings else None
            prepared = ahead.submit(self._prepare, 0, readers)
            working: _Sent | None = None
            for number in range(len(self.batches)):
                ready = prepared.result()
                self.watch("host", None)
                if number + 1 < len(self.batches):
                    prepared = ahead.submit(self._prepare, number + 1, readers)
                sent, pool = self._send(number, ready, pool)
                stopping = False
                if working is not None:
                    answers, stopping = self._receive(working)
                    self.watch("receive", None)
                    yield answers
                working = sent
                if stopping:
                    break
            assert working is not None
            yield self._receive(working)[0]

    def _prepare(self, number: int, readers: ThreadPoolExecutor) -> _Prepared:
        """Reads the pictures that a batch needs, and packs its rows. Runs in a thread."""
        size = self.model.model_config.vision.image_size
        calls = []
        for call in self._calls[number]:
            pixels = np.zeros((len(self._own_ways), self._at_once, size, size, 3), np.uint8)
            first = np.full(len(self._own_ways), -1, np.int32)
            for row, way in enumerate(self._own_ways):
                start, stop = call[way]
                if stop > start:
                    first[row] = start % self._capacity
                for column, view in enumerate(self._views(self._rings[way].stream[start:stop], readers)):
                    if view is not None:
                        pixels[row, column] = view
            calls.append((pixels, first))

        each = self._size // self._ways
        rows = [row for way in self._own_ways for row in range(way * each, (way + 1) * each)]
        numbers = self.batches[number]
        longest = [self.prompts[n] for n in numbers if n is not None]  # of all processes, which agree on the shapes
        slots = max(_slots(len(prompt.keys)) for prompt in longest) if self._rings else 0
        asked = [None if (n := numbers[row]) is None else self.prompts[n] for row in rows]
        nothing = np.zeros((0, 0, 3), np.uint8)
        batch = pack_rows(
            [[p and Example(p.encoded, [nothing] * len(p.keys) if slots else None)] for p in asked],
            text_length=bucket(max(len(prompt.encoded.tokens) for prompt in longest)),
            max_images=slots,
            image=0,
        )
        numbered = np.zeros((len(rows), slots), np.int32)
        bad = {}
        for n, (row, prompt) in enumerate(zip(rows, asked, strict=True)):
            if prompt is None or not slots:
                continue
            places = self._rings[row // each].places[number]
            numbered[n, : len(prompt.keys)] = [places[key] % self._capacity for key in prompt.keys]
            if unread := [self._bad[key] for key in prompt.keys if key in self._bad]:
                bad[row] = unread[0]
        return _Prepared(calls, {name: x for name, x in batch.items() if name != "images"}, numbered, bad)

    def _views(self, keys: Sequence[str], readers: ThreadPoolExecutor) -> Iterator[Any]:
        """The pixels of some views; None: they cannot be read. A picture is decoded once for those of them that it
        has."""
        sources = [self._sources[key] for key in keys]
        pictures = {name: image for name, image, _ in sources}
        read = dict(zip(pictures, readers.map(self._read, pictures.values()), strict=True))
        for key, (name, _, n) in zip(keys, sources, strict=True):
            found = read[name]
            if isinstance(found, DataError) or n >= len(found):
                self._bad[key] = found.reason if isinstance(found, DataError) else "it has changed since it was counted"
                yield None
            else:
                yield found[n]

    def _read(self, image: Any) -> Any:
        try:
            return self.model.loader(image)
        except DataError as error:
            return error

    def _place(self, x: Any, rows: int) -> Any:
        return x if self.model.mesh is None else parallel.to_device(x, self.model.mesh, rows)

    def _send(self, number: int, ready: _Prepared, pool: Any) -> tuple[_Sent, Any]:
        """Starts the programs of a batch; returns before they end."""
        params, programs = self.model.params, self._programs
        with self.model.on_mesh():
            for call in ready.calls:
                pixels, first = self._place(call, self._ways)
                pool = programs.encode(params, pixels, first, pool=pool)
            self.watch("encode", pool)
            batch, slots = self._place((ready.batch, ready.slots), self._size)
            tokens = programs.answer(params, batch, slots, pool if ready.slots.shape[1] else None)
            tokens, words = programs.collect(tokens, self._words(ready.bad))
            self.watch("answer", words)
        for result in (tokens, words):
            result.copy_to_host_async()
        return _Sent(number, tokens, words, ready.bad), pool

    def _words(self, bad: dict[int, str]) -> Any:
        """[2, devices of a row, B]: what this process says of its rows, on its own devices. Processes that hold the
        same rows may say different things."""
        said = np.zeros((2, self._size), np.int32)
        said[0, list(bad)] = 1
        said[1] = self.stop()
        mesh = self.model.mesh
        if mesh is None:
            return said[:, None]
        sharding = NamedSharding(mesh, PartitionSpec(None, "tensor", parallel.BATCH_AXES))
        shape = (2, mesh.shape["tensor"], self._size)

        def of_device(index: Any) -> np.ndarray:
            return said[:, None, index[2]]

        return jax.make_array_from_callback(shape, sharding, of_device)

    def _receive(self, sent: _Sent) -> tuple[list[list[int] | DataError | None], bool]:
        """What the rows of a batch say, and whether all processes stop."""
        tokens, (bad, stop) = np.asarray(sent.tokens), np.asarray(sent.words)
        reasons = self._reasons(sent.bad) if bad.any() else {}
        said = self.model.generator.until_end(tokens)
        answers: list[list[int] | DataError | None] = []
        for row, n in enumerate(self.batches[sent.number]):
            if n is None:
                answers.append(None)
            elif bad[row]:
                answers.append(DataError(reasons.get(row, "its picture cannot be read"), f"{n}"))
            else:
                answers.append(said[row])
        return answers, bool(stop.any())

    def _reasons(self, own: dict[int, str]) -> dict[int, str]:
        """Why rows are bad, of all processes."""
        if jax.process_count() == 1:
            return own
        said = np.zeros((self._size, REASON_BYTES), np.uint8)
        for row, reason in own.items():
            text = reason.encode()[:REASON_BYTES]
            said[row, : len(text)] = np.frombuffer(text, np.uint8)
        found: dict[int, str] = {}
        for of_process in np.asarray(multihost_utils.process_allgather(said)):
            for row in np.flatnonzero(of_process.any(axis=1)).tolist():
                found.setdefault(row, of_process[row].tobytes().rstrip(b"\0").decode(errors="ignore"))
        return found
