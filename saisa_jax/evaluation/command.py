"""What `eval.py` does with its flags."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any

import jax
from etils import epath
from rich.console import Console
from rich.table import Table

from saisa_jax import parallel
from saisa_jax.checkpoints import local_model
from saisa_jax.config import STAGES, ConfigError
from saisa_jax.evaluation import overview, runner
from saisa_jax.evaluation.settings import Settings
from saisa_jax.evaluation.tasks import TASKS
from saisa_jax.inference.model import load


def ask(
    checkpoint: str,
    question: str,
    images: Sequence[str],
    max_new_tokens: int | None = None,
    **placed: Any,
) -> str:
    """The model's answer to one question about some images; `placed` as in `run`."""
    model = load(checkpoint, **placed)
    tokens = max_new_tokens or model.config.evaluation.max_new_tokens
    return model.generate([question], [list(images)], tokens)[0]


def run(
    checkpoint: str,
    output: str,
    *,
    tasks: Sequence[str] = (),
    data: str = "",
    images: str = "",
    limit: int | None = None,
    batch_size: int | None = None,
    image_cache_bytes: int | None = None,
    max_new_tokens: int | None = None,
    prompts: str = "llava",
    stop: Callable[[], bool] = lambda: False,
    **placed: Any,
) -> None:
    """Evaluates a model and prints a table for each task. What is empty or None is as the model's configuration says.

    Every process calls it; the first one prints and writes.

    Args:
      stop: whether this process was asked to stop (`Stop`).
      placed: where the parameters go, and as what: `mesh`, `dtype`, `quantize`, `switches` and `blind` of `load`.

    Raises:
      UserError: nothing can be evaluated; the message names the flag that fixes it.
      runner.Interrupted: Ctrl-C, while questions are answered; or `stop` of any process.
    """
    for name in tasks:
        _ = TASKS[name]  # a typo is answered before anything is loaded
    if images and not data:
        raise ConfigError(f"--images={images} needs --data=FILE, whose pictures it holds")
    console = Console(quiet=jax.process_index() > 0)
    console.print(f"Evaluating {checkpoint}", highlight=False, soft_wrap=True)
    model = parallel.together(lambda: load(checkpoint, **placed))
    defaults = model.config.evaluation
    tasks = tuple(dict.fromkeys(tasks or defaults.tasks))
    if not tasks:
        raise ConfigError(
            f"the recipe names no benchmark (evaluation.tasks): choose with --tasks=NAME,NAME from {', '.join(TASKS)}"
        )
    given = {"batch_size": batch_size, "image_cache_bytes": image_cache_bytes, "max_new_tokens": max_new_tokens}
    given |= {"limit": limit, "quantize": placed.get("quantize"), "data": data, "images": images, "prompts": prompts}
    for name in tasks:
        settings = Settings.of(name, defaults, **given)
        record = runner.evaluate(model, name, settings, epath.Path(output), checkpoint, stop)
        if record is not None:  # in the first process
            show(console, record, output)
    if jax.process_index() > 0:
        return
    records = overview.write(epath.Path(output) / "evaluation", checkpoint, model.stage)
    if len(records) > 1:
        console.print(overview.table(records))
    files = " and ".join(f"{name}.json" for name in tasks)
    console.print(f"{files} with the answers (.jsonl) are in {output}/evaluation", highlight=False, soft_wrap=True)


def show(console: Console, record: dict[str, Any], output: str) -> None:
    """Prints a record: its table, what was not scored or asked, and the files for servers and judges."""
    console.print(table(record))
    for line in (record["note"], *(f"{output}/evaluation/{file}" for file in record["files"])):
        if line:
            console.print(line, highlight=False, soft_wrap=True, markup=False)
    if record["failed"]:
        some = ", ".join(list(record["failed"])[:3])
        console.print(
            f"{len(record['failed'])} more could not be asked and count nowhere: {some}, ... (`error` in the file)",
            highlight=False,
        )


def model_of(workdir: str) -> str:
    """Where the model of a run's last finished stage lies.

    Raises:
      ConfigError: no stage of it is finished.
    """
    for stage in reversed(STAGES):
        directory = local_model(workdir, stage)
        if directory.exists():
            return str(directory)
    raise ConfigError(
        f"--workdir={workdir} holds no finished model: there is no {workdir}/finetune/model and no "
        f"{workdir}/pretrain/model. python train.py --config=... --workdir={workdir} makes them"
    )


def table(record: dict[str, Any]) -> Table:
    """The accuracies of a `TASK.json`, beside those of an answer without the image."""
    limited = "" if record["complete"] else f", the first {record['n']} questions"
    school = f", prompts and scores of {record['prompts']}" if record.get("prompts") else ""
    shown = Table(title=f"{record['model']['name']} on {record['task']}{school}{limited}", title_justify="left")
    for name in ("", record["metric"], "95% interval", "questions", "without image"):
        shown.add_column(name, justify="right" if name else "left", no_wrap=True)
    baseline = record["baseline"]
    rows = [("overall", record["overall"]), *record["groups"].items()]
    if name := record.get("headline"):
        shown.add_row(name, f"{record['metrics'][name]:.4g}" if name in record["metrics"] else "", "", "", "")
    for name, part in rows:
        guess = f"{baseline[name]:.1%}" if name in baseline else ""
        shown.add_row(name.replace("_", "/"), *_cells(part), guess)
    for section in (record["kinds"], record["metrics"]):
        if section:
            shown.add_section()
        for name, part in section.items():
            shown.add_row(name, *(_cells(part) if isinstance(part, dict) else (f"{part:.4g}", "", "")), "")
    return shown


def _cells(part: dict[str, Any]) -> tuple[str, str, str]:
    if part["accuracy"] is None:
        return "", "", str(part["n"])
    low, high = part["interval"]
    return f"{part['accuracy']:.1%}", f"{low:.1%} to {high:.1%}", str(part["n"])


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is as good as Ctrl-C here."""


class Stop:
    """While it is entered, SIGTERM stops an evaluation as Ctrl-C does.

    One process stops at once. Of several, which stop together after a batch, one signal to one of them is a wish, which
    a call tells; the second one stops it at once.

    Attributes:
      number: of the signal that was a wish.
    """

    def __init__(self, several: bool = False) -> None:
        self.number: int | None = None
        self._several = several
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self.number is not None

    def __enter__(self) -> Stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as for a job that a shell runs in the background
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._several and self.number is None:
            self.number = number
            with contextlib.suppress(OSError):  # straight to the descriptor: it may have come in the middle of a print
                os.write(2, f"\n{signal.Signals(number).name}: all processes stop after this batch\n".encode())
            return
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
