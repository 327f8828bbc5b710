"""What a run says about itself: rows in a file, TensorBoard events, and a line of progress."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np
from absl import logging
from etils import epath


class MetricsWriter:
    """Appends rows to `directory/metrics.jsonl`, and their numbers to `directory/tensorboard`.

    A row is {"kind", "step", ...} as one line of valid JSON: a NaN or an infinity is null. It is on disk when `write`
    returns. In a run of several processes the first one writes.

    Args:
      directory: made if it is not there.
      tensorboard: write TensorBoard events too. They are written anew from the rows when a run goes on, since
        tensorboardX loses the last ones when it is killed; TensorBoard hides what earlier files say.
      resume_step: the last step that counts; later rows, written before an interruption, are cut off and will be
        written again. 0: from the start. None: keep all.
    """

    def __init__(self, directory: str | os.PathLike[str], tensorboard: bool = True, resume_step: int | None = None):
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "metrics.jsonl"
        cut_back(self.path, resume_step)
        self._file = self.path.open("a")
        self._events: Any = _event_writer(directory / "tensorboard", resume_step) if tensorboard else None
        if self._events is not None and resume_step is not None:
            for line in self.path.read_text().splitlines():
                self._show(json.loads(line))

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except OSError:
            if error is None:
                raise  # or else the first error is the one to raise

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Writes a row.

        Args:
          kind: "train", "eval" or the like.
          step: the step that the values are of.
          values: numbers, also of NumPy and JAX; strings; lists and dictionaries of them.
        """
        row = jsonable({"kind": kind, "step": step, **values})
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            self._show(row)

    def _show(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                self._events.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    def holds(self, kind: str, step: int) -> bool:
        """Whether a row of this kind and step is there."""
        rows = map(json.loads, self.path.read_text().splitlines())
        return any((row["kind"], row["step"]) == (kind, step) for row in rows)

    def close(self) -> None:
        try:
            self._file.close()
        finally:
            if self._events is not None:
                _close_events(self._events)


def cut_back(path: epath.Path, resume_step: int | None) -> None:
    """Drops rows after `resume_step`, and a last line that a crash has cut short."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if _counts(line, resume_step)]
    if kept != lines:
        new = path.parent / f".{path.name}.new"
        new.write_text("".join(kept))
        new.replace(path)


def _counts(line: str, resume_step: int | None) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return line.endswith("\n") and (resume_step is None or row["step"] <= resume_step)


def _event_writer(directory: epath.Path, resume_step: int | None) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "training.tensorboard needs tensorboardX: pip install tensorboardX, or --config.training.tensorboard=False"
        ) from error
    return SummaryWriter(os.fspath(directory), purge_step=None if resume_step is None else 0)  # hides all steps from 0


def _close_events(events: Any) -> None:
    """On a full disk a warning: the run has more to say, and when it goes on the events are written anew."""
    writers = [writer.event_writer for writer in events.all_writers.values()]
    try:
        events.close()
    except OSError as error:
        logging.warning("TensorBoard's last events were not written: %s", error)
        for writer in writers:  # or else they try again at exit, and print pages
            writer._closed = True
            if writer._worker.is_alive():
                writer._worker.stop()


def jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    array = np.asarray(value)
    if array.dtype.kind == "O":
        raise TypeError(f"a metric cannot be {type(value).__name__}: {value!r}")
    if array.dtype.kind not in "biufUS":  # bfloat16 and its kin
        array = array.astype(np.float32)
    return jsonable(array.tolist())


class Progress:
    """Where a run is and how long it will still take: a live bar on a terminal, otherwise a line for each update.

    Args:
      name: of what is going on.
      total: steps in all.
      first: the step that was reached before.
      stream: a text stream; None: stderr.
    """

    def __init__(self, name: str, total: int, first: int = 0, stream: Any = None):
        self._name, self._total, self._step = name, total, first
        self._stream = stream or sys.stderr
        self._time = time.monotonic()
        self._seconds_per_step: float | None = None
        self._updates = 0
        self._bar = _Bar(name, total, first, self._stream) if self._stream.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(self, step: int, *, samples: int, tokens: float | None = None, **values: float) -> dict[str, float]:
        """Shows a step; called every so many steps.

        Args:
          step: the step that was reached.
          samples: of one step.
          tokens: of one step; only a rate is made of it.
          values: shown as they are: loss, lr.

        Returns:
          {"samples_per_second"} and, if `tokens` was given, {"tokens_per_second"}, since the last update.
        """
        now = time.monotonic()
        steps, seconds = step - self._step, max(now - self._time, 1e-9)
        self._step, self._time = step, now
        steps_per_second = steps / seconds
        rates = {"samples_per_second": samples * steps_per_second}
        if tokens is not None:
            rates["tokens_per_second"] = float(tokens) * steps_per_second
        if steps > 0:
            self._note_pace(seconds / steps)
        line = "  ".join([*(f"{name} {value:.4g}" for name, value in values.items()), *map(_show_rate, rates.items())])
        left = self._left()
        if self._bar is not None:
            self._bar.show(step, line, left)
        else:
            print(f"{self._name}: step {step}/{self._total}  {line}  {left} left", file=self._stream, flush=True)
        return rates

    def close(self) -> None:
        """Leaves the terminal as it was; may be called twice."""
        if self._bar is not None:
            self._bar.close()

    def _note_pace(self, seconds_per_step: float) -> None:
        """A running mean; the first update, which holds the compilation, is forgotten at the second."""
        self._updates += 1
        if self._seconds_per_step is None or self._updates == 2:
            self._seconds_per_step = seconds_per_step
        else:
            self._seconds_per_step += 0.3 * (seconds_per_step - self._seconds_per_step)

    def _left(self) -> str:
        if self._seconds_per_step is None:
            return "?"
        return duration((self._total - self._step) * self._seconds_per_step)


class _Bar:
    """The live line."""

    def __init__(self, name: str, total: int, first: int, stream: Any):
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as RichProgress
        except ImportError as error:
            raise ImportError("the progress bar needs rich: pip install rich") from error
        self._rich = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("[cyan]{task.fields[left]} left"),
            TextColumn("{task.fields[line]}"),  # last: a narrow terminal cuts it off
            console=Console(file=stream),
        )
        self._task = self._rich.add_task(name, total=total, completed=first, line="starting", left="?")
        self._rich.start()

    def show(self, step: int, line: str, left: str) -> None:
        self._rich.update(self._task, completed=step, line=line, left=left, refresh=True)

    def close(self) -> None:
        self._rich.stop()


def _show_rate(item: tuple[str, float]) -> str:
    name, value = item
    unit = name.removesuffix("_per_second")
    number = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{number} {unit}/s"


def duration(seconds: float) -> str:
    """Seconds as "2h 03m", "4m 05s" or "6s"."""
    seconds = max(0, round(seconds))
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {seconds % 60:02}s" if minutes else f"{seconds}s"
