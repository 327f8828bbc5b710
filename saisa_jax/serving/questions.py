"""What is asked of an engine, what it tells while it answers, and what the server's routes need of one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from saisa_jax.errors import UserError
from saisa_jax.inference.generate import GREEDY, Sampling
from saisa_jax.inference.model import Request, VisionLanguageModel
from saisa_jax.serving.text import TextStream

STOP, LENGTH = "stop", "length"  # why an answer ended


class UnavailableError(UserError):
    """The engine takes no questions: it is not warm yet, or about to end."""


class OverdueError(UserError):
    """A question that was not answered in time."""


@dataclass(frozen=True)
class Question:
    """What is asked, ready for the model.

    Attributes:
      request: tokens, and pictures that need not be encoded yet.
      max_new_tokens: of the answer; with the prompt within `model.max_length`.
      sampling: greedy by default.
      seed: of the sampling.
      stop: the answer ends before the first of these strings.
      deadline: of `time.monotonic`.
      ignore_eos: the answer goes on after an end token, to `max_new_tokens`: for measuring.
    """

    request: Request
    max_new_tokens: int
    sampling: Sampling = GREEDY
    seed: int = 0
    stop: tuple[str, ...] = ()
    deadline: float = float("inf")
    ignore_eos: bool = False


@dataclass(frozen=True)
class Said:
    """More of an answer."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The end of an answer: why, of how many tokens, and how many places of the prompt's pictures were kept ones."""

    reason: str
    tokens: int
    cached: int


@dataclass(frozen=True)
class Failed:
    """There is no answer, or no more of it."""

    error: Exception


Event = Said | Ended | Failed
OVERDUE = "no answer within the time limit of this server"
CLOSING = "the server is shutting down"


@dataclass(eq=False)
class Ticket:
    """A question on its way; `listen` is called with its events, in a thread of the engine."""

    question: Question
    listen: Callable[[Event], None]
    cancelled: bool = False

    def tell(self, event: Event) -> None:
        try:
            self.listen(event)
        except RuntimeError:  # the listener's event loop is closed
            self.cancelled = True


class Telling:
    """An answer while it comes: its tokens, told to the ticket's listener as text.

    Args:
      ticket: whose answer it is.
      model: whose tokens they are.

    Attributes:
      tokens: so far, without the one that ends the answer.
    """

    def __init__(self, ticket: Ticket, model: VisionLanguageModel) -> None:
        self.tokens: list[int] = []
        self._ticket, self._ends = ticket, model.generator.eos_ids
        self._text = TextStream(model.tokenizer, ticket.question.stop)

    def take(self, token: int) -> str | None:
        """One more token; why the answer ends with it, and then all of its text is told. None: it does not."""
        question, reason = self._ticket.question, None
        if token in self._ends and not question.ignore_eos:
            reason = STOP
        else:
            self.tokens.append(token)
            self._say(self._text.push(token))
            if self._text.stopped:
                reason = STOP
            elif len(self.tokens) == question.max_new_tokens:
                reason = LENGTH
        if reason:
            self._say(self._text.finish())
        return reason

    def _say(self, text: str) -> None:
        if text:
            self._ticket.tell(Said(text))


@runtime_checkable
class Answers(Protocol):
    """What the routes need of an engine.

    Attributes:
      model: that is asked: its words, its pictures, its lengths.
      count: how many questions are answered at once.
      max_images: image slots of a question: pictures, or their views.
      ready: set when questions are taken.
      warmed: (what is prepared, what has to be) before that.
      counters: (name, about, value) of what only grows, for /metrics.
    """

    model: VisionLanguageModel
    ready: threading.Event
    warmed: tuple[int, int]

    @property
    def count(self) -> int: ...
    @property
    def max_images(self) -> int: ...
    @property
    def counters(self) -> Iterable[tuple[str, str, float]]: ...
    @property
    def alive(self) -> bool:
        """Whether it goes on answering."""
        ...

    @property
    def closing(self) -> bool:
        """Whether it takes no more questions."""
        ...

    @property
    def waiting(self) -> int:
        """Questions that are not being answered yet."""
        ...

    @property
    def busy(self) -> int:
        """Questions that are being answered."""
        ...

    def start(self) -> None:
        """Begins to prepare, and then to answer."""
        ...

    def submit(self, question: Question, listen: Callable[[Event], None]) -> Any:
        """Takes a question; its ticket, for `cancel`.

        Args:
          question: what is asked.
          listen: called in a thread of the engine with `Said` any number of times, then `Ended` or `Failed`; neither
            after `cancel`.

        Raises:
          UnavailableError: no questions are taken.
        """
        ...

    def cancel(self, ticket: Any) -> None:
        """Ends the answer of a ticket; of one that has ended, nothing."""
        ...

    def drain(self) -> None:
        """Takes no more questions, refuses those that wait, and ends when the others are answered."""
        ...

    def join(self, timeout: float | None = None) -> None:
        """Waits for the end after `drain`."""
        ...
