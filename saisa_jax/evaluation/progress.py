"""How far an evaluation is: a bar on a terminal, else now and then a line."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Use it as a context manager.

    Args:
      name: of what is evaluated.
      total: questions.
      before: (questions, sum of their scores) that an earlier start has answered; they say nothing about the time left.
    """

    def __init__(
        self, name: str, total: int, console: Console | None = None, before: tuple[int, float] = (0, 0.0)
    ) -> None:
        self.name, self.total = name, total
        self._before, self._scores = before
        self._done = self._before
        self._console = console or Console()
        self._started = self._last_line = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Bar(*columns, console=self._console) if self._console.is_terminal else None
        self._row = self._bar.add_task(name, total=total, completed=self._before) if self._bar else None

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    @property
    def rate(self) -> float:
        """Questions a second, of this start."""
        return max(1, self._done - self._before) / max(time.monotonic() - self._started, 1e-9)

    @property
    def seconds_left(self) -> float:
        """At the rate of this start."""
        return (self.total - self._done) / self.rate

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._console.print(f"{self.name}: {line}", highlight=False, soft_wrap=True)

    def update(self, questions: int, score: float) -> None:
        """So many questions more were answered, with that sum of scores."""
        self._done, self._scores = self._done + questions, self._scores + score
        share = f"{self.name}: {self._scores / self._done:.1%} right, {_rate(self.rate)}/s"
        if self._bar and self._row is not None:
            self._bar.update(self._row, completed=self._done, description=share)
            return
        now = time.monotonic()
        if now - self._last_line < SECONDS_BETWEEN_LINES and self._done < self.total:
            return
        self._last_line = now
        line = f"{share}, {self._done} of {self.total} questions, {_clock(self.seconds_left)} left"
        self._console.print(line, highlight=False)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes = round(seconds) // 60
    if minutes < 3:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {seconds % 60:.0f} s"
