"""The metrics of a run: rows in a file, TensorBoard events, and a line of progress."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from saisa_jax import buckets
from saisa_jax.chips import GIB
from saisa_jax.training.telemetry.wandb import WandbLog


class MetricsWriter:
    """Appends rows to `directory/metrics.jsonl`, and their numbers to `directory/tensorboard` and to W&B.

    A row is {"kind", "step", ...} as one line of valid JSON: a NaN or an infinity is null. It is on disk when `write`
    returns; in a bucket, where nothing can be appended to, within a minute, and after `upload`.

    Args:
      directory: local or `gs://`; made if it is not there.
      tensorboard: write TensorBoard events too. They are rewritten from the rows when a run resumes, since
        tensorboardX loses the last ones when it is killed; TensorBoard hides what earlier files say.
      resume_step: the last step that counts; later rows, written before an interruption, are cut off and will be
        written again. 0: from the start. None: keep all.
      wandb: a log of W&B, which is closed together with this one; None: there is none.

    Attributes:
      path: of the file that is written; of a bucket's the local copy.
      cut: the rows that were cut off.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        tensorboard: bool = True,
        resume_step: int | None = None,
        wandb: WandbLog | None = None,
    ):
        self._mirror = buckets.Mirror(buckets.place(directory), ("metrics.jsonl",))
        self.path = epath.Path(self._mirror.local) / "metrics.jsonl"
        self.cut = cut_back(self.path, resume_step)
        self._file = self.path.open("a")
        self._events: Any = _event_writer(self._mirror.local / "tensorboard", resume_step) if tensorboard else None
        self._wandb = wandb
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
        if self._wandb is not None:
            self._wandb.write(kind, step, _numbers(row))
        self._mirror.upload(force=False)

    def upload(self) -> None:
        """Brings what was written to where it is kept, before a checkpoint says that it is there."""
        self._mirror.upload()

    def _show(self, row: Mapping[str, Any]) -> None:
        for name, value in _numbers(row).items():
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
            self._mirror.close()
            if self._wandb is not None:
                self._wandb.close()


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def cut_back(path: epath.Path, resume_step: int | None) -> list[dict[str, Any]]:
    """Drops rows after `resume_step`, which it returns, and a last line that a crash has cut short.

    Rows of goodput go with them: a resumed run counts what is in them.
    """
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    rows = [_row(line) for line in lines]
    counts = [row is not None and (resume_step is None or _stays(row, resume_step)) for row in rows]
    if not all(counts):
        buckets.write_text(path, "".join(line for line, kept in zip(lines, counts, strict=True) if kept))
    return [row for row, kept in zip(rows, counts, strict=True) if row is not None and not kept]


def _stays(row: Mapping[str, Any], resume_step: int) -> bool:
    return row["step"] <= resume_step and row.get("kind") != "goodput"


def _row(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return None


def _event_writer(directory: Path, resume_step: int | None) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "training.tensorboard needs tensorboardX: pip install tensorboardX, or --config.training.tensorboard=False"
        ) from error
    return SummaryWriter(os.fspath(directory), purge_step=None if resume_step is None else 0)  # hides all steps from 0


def _close_events(events: Any) -> None:
    """On a full disk this is only a warning: when the run resumes, the events are rewritten from the rows."""
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


def _rate(unit: str) -> Callable[[float], str]:
    return lambda value: f"{value:,.0f} {unit}/s" if value >= 100 else f"{value:.3g} {unit}/s"


SHOWN: dict[str, Callable[[float], str]] = {  # in a line of progress, in this order
    "loss": "loss {:.4g}".format,
    "lr": "lr {:.4g}".format,
    "grad_norm": "grad {:.3g}".format,
    "samples_per_second": _rate("samples"),
    "tokens_per_second": _rate("tokens"),
    "mfu": "MFU {:.1%}".format,
    "hfu": "HFU {:.1%}".format,
    "tflops_per_second": lambda value: f"{value:.3g} TFLOP/s" if value >= 1 else f"{1e3 * value:.3g} GFLOP/s",
    "data_wait": "data wait {:.0%}".format,
    "slowest_process": "process {:.0f} waits longest for data:".format,
    "slowest_data_wait": "{:.0%}".format,
    "dropped": lambda value: f"{value:,.0f} samples dropped" if value else "",
    "text_fill": "text {:.0%} full".format,
    "image_fill": "images {:.0%} full".format,
    "device_memory_bytes": lambda value: f"{value / GIB:.1f} GiB a device",
    "process_memory_bytes": lambda value: f"{value / GIB:.1f} GiB of memory",
}


class Progress:
    """Where a run is and how long it will still take: a live bar on a terminal, otherwise a line for each update.

    Args:
      name: of what is going on.
      total: steps in all.
      first: the step that was reached before.
      stream: a text stream; None: stderr.
      shown: write anything; of several processes only the first does.
    """

    def __init__(self, name: str, total: int, first: int = 0, stream: Any = None, shown: bool = True):
        self._shown = shown
        self._name, self._total = name, total
        self._stream = stream or sys.stderr
        self._bar = _Bar(name, total, first, self._stream) if shown and self._stream.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(self, step: int, **values: float) -> None:
        """Shows a step.

        Args:
          step: the step that was reached.
          values: of a row of kind "train"; those that SHOWN names are shown.
        """
        line = "  ".join(filter(None, (show(values[name]) for name, show in SHOWN.items() if name in values)))
        left = duration(values["seconds_left"]) if "seconds_left" in values else "?"
        if self._bar is not None:
            self._bar.show(step, line, left)
        elif self._shown:
            print(f"{self._name}: step {step}/{self._total}  {line}  {left} left", file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was; may be called twice."""
        if self._bar is not None:
            self._bar.close()


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


def duration(seconds: float) -> str:
    """Seconds as "2h 03m", "4m 05s" or "6s"."""
    seconds = max(0, round(seconds))
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {seconds % 60:02}s" if minutes else f"{seconds}s"
