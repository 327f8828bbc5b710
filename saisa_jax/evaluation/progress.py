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
    """

    def __init__(self, name: str, total: int, console: Console | None = None):
        self.name, self.total = name, total
        self._done = self._right = 0
        self._console = console or Console()
        self._started = self._last_line = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Bar(*columns, console=self._console) if self._console.is_terminal else None
        self._row = self._bar.add_task(name, total=total) if self._bar else None

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, questions: int, right: int) -> None:
        """So many questions more were answered, so many of them rightly."""
        self._done, self._right = self._done + questions, self._right + right
        share = f"{self.name}: {self._right / self._done:.1%} right"
        if self._bar and self._row is not None:
            self._bar.update(self._row, completed=self._done, description=share)
            return
        now = time.monotonic()
        if now - self._last_line < SECONDS_BETWEEN_LINES and self._done < self.total:
            return
        self._last_line = now
        left = (now - self._started) / self._done * (self.total - self._done)
        self._console.print(f"{share}, {self._done} of {self.total} questions, {left:.0f} s left", highlight=False)
