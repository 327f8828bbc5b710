"""Continuous batching: questions join and leave a running batch, each step by step.

One thread owns the devices. In each round it admits waiting questions to free rows, does one piece of the work before
an answer (encodes one picture, or reads one piece of a prompt), and chooses the next token of every row that decodes:
whatever is asked, no answer waits longer than one such piece for its next token. A row is free again in the round in
which its answer ends. Pictures are found by content in the model's image cache, so that a second question about one
costs its text alone.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import logging

from saisa_jax.inference.image_cache import EncodedImage
from saisa_jax.inference.model import VisionLanguageModel
from saisa_jax.serving.questions import (
    CLOSING,
    OVERDUE,
    Ended,
    Event,
    Failed,
    OverdueError,
    Question,
    Telling,
    Ticket,
    UnavailableError,
)
from saisa_jax.serving.rows import Choices, Rows


@dataclass
class _Row:
    """A question that has a row."""

    ticket: Ticket
    telling: Telling
    pieces: deque[tuple[int, int]]  # of the prompt, to be read
    columns: int
    images: deque[tuple[int, EncodedImage]]  # (slot, picture), to be placed
    cached: int = 0

    @property
    def tokens(self) -> list[int]:
        """Of the answer."""
        return self.telling.tokens

    @property
    def decodes(self) -> bool:
        return not self.images and not self.pieces


class Engine:
    """Answers questions in rows of one batch.

    Args:
      model: of any alignment but llava.
      rows: how many are answered at once.
      max_images: of a question.
      pieces: of prompts (`Rows`).

    Attributes:
      ready: set when the programs are compiled, and questions are taken.
      warmed: (levels that are compiled, levels).
      prompt_tokens, generated_tokens, steps, step_seconds: so far.
    """

    def __init__(self, model: VisionLanguageModel, rows: int = 8, max_images: int = 4, **pieces: Any) -> None:
        self.model = model
        self.rows = Rows(model, rows, max_images, **pieces)
        self.ready = threading.Event()
        self.warmed = (0, len(self.rows.levels))
        self.prompt_tokens = self.generated_tokens = self.steps = 0
        self.step_seconds = 0.0
        self._waiting: deque[Ticket] = deque()
        self._busy: dict[int, _Row] = {}  # in the order of admission
        self._changed = threading.Condition()  # of these and the next one; reentrant, as a signal's handler needs it
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- from any thread ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to compile, and then to answer."""
        self._thread.start()

    @property
    def count(self) -> int:
        """Rows."""
        return self.rows.count

    @property
    def max_images(self) -> int:
        """Of a question."""
        return self.rows.max_images

    @property
    def counters(self) -> Iterator[tuple[str, str, float]]:
        """(name, about, value) of what only grows."""
        yield "steps", "decoding steps", self.steps
        yield "step_seconds", "seconds in decoding steps", self.step_seconds
        yield "prompt_tokens", "positions of prompts, visual tokens included", self.prompt_tokens
        yield "generated_tokens", "tokens of answers", self.generated_tokens

    @property
    def alive(self) -> bool:
        """Whether there is a thread that answers."""
        return self._thread.is_alive()

    @property
    def closing(self) -> bool:
        """Whether it takes no more questions."""
        return self._closing

    @property
    def waiting(self) -> int:
        """Questions without a row."""
        return len(self._waiting)

    @property
    def busy(self) -> int:
        """Rows that are in use."""
        return len(self._busy)

    def submit(self, question: Question, listen: Callable[[Event], None]) -> Ticket:
        """Puts a question in the queue.

        Args:
          question: what is asked.
          listen: called in the engine's thread with `Said` any number of times, then `Ended` or `Failed`; neither
            after `cancel`.

        Raises:
          UnavailableError: the programs are not compiled yet, or the engine is closing.
        """
        with self._changed:
            if self._closing:
                raise UnavailableError(CLOSING)
            if not self.ready.is_set():
                raise UnavailableError("the server is compiling its programs: /health says when it is ready")
            ticket = Ticket(question, listen)
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Frees the ticket's row with the next step; of one that has ended, nothing."""
        ticket.cancelled = True

    def drain(self) -> None:
        """Takes no more questions, refuses those without a row, and ends when the others are answered."""
        with self._changed:
            self._closing = True
            while self._waiting:
                self._waiting.popleft().tell(Failed(UnavailableError(CLOSING)))
            self._changed.notify()

    def join(self, timeout: float | None = None) -> None:
        """Waits for the end after `drain`."""
        self._thread.join(timeout)

    # --- the engine's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with self.model.on_mesh():
            self._warm_up()
            while self._has_work():
                self._drop()
                self._admit()
                self._guarded(self._prepare)
                self._guarded(self._decode)

    def _warm_up(self) -> None:
        start, image = time.monotonic(), None
        if self.rows.max_images:
            size = self.model.model_config.vision.image_size
            image = self.model.encode_images([EncodedImage.of(np.zeros((size, size, 3), np.uint8))])[0].kv
        for number, level in enumerate(self.rows.levels, start=1):
            self.rows.warm_up(level, image)
            self.warmed = number, len(self.rows.levels)
            logging.info(
                "compiled %d of %d sizes: %d rows of %d tokens and %d image(s), %.0f MB of keys and values",
                *self.warmed, self.rows.count, *level, self.rows.nbytes / 1e6,
            )  # fmt: skip
        self.rows.reset()
        logging.info("ready after %.1f s", time.monotonic() - start)
        self.ready.set()

    def _has_work(self) -> bool:
        """Waits for a question; whether there is one, or else the engine is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._busy or self._closing)
            return bool(self._waiting or self._busy)

    def _guarded(self, act: Callable[[], None]) -> None:
        """A failed program (no memory, for example) takes the rows with it, whose buffers it had, and no more."""
        try:
            act()
        except Exception as error:
            logging.exception("the rows that were being answered are lost")
            for row in list(self._busy):
                self._end(row, Failed(error), clear=False)
            self.rows.reset()

    def _drop(self) -> None:
        """Frees what nobody waits for, and what is overdue."""
        now = time.monotonic()
        gone = lambda ticket: ticket.cancelled or ticket.question.deadline < now  # noqa: E731
        for row in [row for row, held in self._busy.items() if gone(held.ticket)]:
            self._end(row, Failed(OverdueError(OVERDUE)))
        with self._changed:
            dropped = [ticket for ticket in self._waiting if gone(ticket)]
            for ticket in dropped:
                self._waiting.remove(ticket)
        for ticket in dropped:
            if not ticket.cancelled:
                ticket.tell(Failed(OverdueError(OVERDUE)))

    def _admit(self) -> None:
        """Gives free rows to those who wait longest, and the buffers the size that all rows need."""
        for row in range(self.rows.count):
            if row not in self._busy:
                with self._changed:
                    if not self._waiting:
                        break
                    ticket = self._waiting.popleft()
                    self._busy[row] = self._row_of(ticket)
                self.prompt_tokens += ticket.question.request.encoded.length
        if self._busy:
            columns = max(held.columns for held in self._busy.values())
            images = max(len(held.ticket.question.request.images) for held in self._busy.values())
            self.rows.fit(self.rows.level_of(columns, min(images, self.rows.max_images)))

    def _row_of(self, ticket: Ticket) -> _Row:
        question, rows = ticket.question, self.rows
        tokens = len(question.request.encoded.tokens)
        images = question.request.images if rows.max_images else ()  # a blind model's slots stay empty
        return _Row(
            ticket,
            Telling(ticket, self.model),
            deque(rows.pieces_of(tokens)),
            rows.columns_of(tokens, question.max_new_tokens),
            deque(enumerate(images)),
        )

    def _prepare(self) -> None:
        """One piece of work for the row that waits longest for its first token."""
        row, held = next(((row, held) for row, held in self._busy.items() if not held.decodes), (-1, None))
        if held is None:
            return
        while held.images:
            if self._place(row, held):
                return
        self._read(row, held)

    def _place(self, row: int, held: _Row) -> bool:
        """Puts the next picture into its slot; whether it had to be encoded, or could not be."""
        slot, image = held.images.popleft()
        encoded = held.ticket.question.request.encoded
        cache = self.model.image_cache
        misses = cache.misses
        try:
            kv = self.model.encode_images([image])[0].kv
        except Exception as error:  # no memory for one more picture: the other rows go on
            logging.exception("a picture could not be encoded")
            self._end(row, Failed(error))
            return True
        assert kv is not None
        self.rows.place(row, slot, kv, int(encoded.image_positions[slot]))
        new = cache.misses > misses
        held.cached += 0 if new else self.model.model_config.num_visual_tokens
        return new

    def _read(self, row: int, held: _Row) -> None:
        start, size = held.pieces.popleft()
        question, piece = held.ticket.question, slice(start, start + size)
        encoded = question.request.encoded
        token = self.rows.read(row, encoded.tokens[piece], encoded.positions[piece], _choices([held]))
        if not held.pieces:
            self._take(row, held, int(np.asarray(token)[0]))

    def _decode(self) -> None:
        """One more token in every row whose prompt is read."""
        busy = {row: held for row, held in self._busy.items() if held.decodes}
        if not busy:
            return
        start = time.monotonic()
        every = [busy.get(row) for row in range(self.rows.count)]
        tokens = np.asarray([held.tokens[-1] if held else 0 for held in every], np.int32)
        positions = [_position(held) if held else 0 for held in every]
        active = np.asarray([held is not None for held in every], np.int32)
        new = np.asarray(self.rows.step(tokens, np.asarray(positions, np.int32), active, _choices(every)))
        for row, held in busy.items():
            self._take(row, held, int(new[row]))
        self.steps += 1
        self.step_seconds += time.monotonic() - start

    def _take(self, row: int, held: _Row, token: int) -> None:
        """A new token of a row."""
        had = len(held.tokens)
        reason = held.telling.take(token)
        self.generated_tokens += len(held.tokens) - had
        if reason:
            self._end(row, Ended(reason, len(held.tokens), held.cached))

    def _end(self, row: int, event: Event, clear: bool = True) -> None:
        ticket = self._busy.pop(row).ticket
        if clear:
            self.rows.clear(row)
        if not ticket.cancelled:
            ticket.tell(event)


def _position(held: _Row) -> int:
    """Of the last token that was chosen, which is read next."""
    return held.ticket.question.request.encoded.length + len(held.tokens) - 1


def _choices(rows: list[Any]) -> Choices:
    def of(value: Callable[[_Row], Any], default: Any, dtype: Any) -> np.ndarray:
        return np.asarray([value(held) if held else default for held in rows], dtype)

    return Choices(
        of(lambda held: held.ticket.question.seed % 2**32, 0, np.uint32),
        of(lambda held: len(held.tokens), 0, np.int32),
        of(lambda held: held.ticket.question.sampling.temperature, 0, np.float32),
        of(lambda held: held.ticket.question.sampling.top_p, 1, np.float32),
    )
