"""What `eval.py` does with its flags."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from etils import epath
from rich.console import Console
from rich.table import Table

from saisa_jax.checkpoints import local_model
from saisa_jax.config import STAGES, ConfigError
from saisa_jax.evaluation import runner, tasks
from saisa_jax.inference.model import load


def ask(
    checkpoint: str,
    question: str,
    images: Sequence[str],
    max_new_tokens: int | None = None,
    quantize: str | None = None,
) -> str:
    """The model's answer to one question about some images."""
    model = load(checkpoint, quantize=quantize)
    tokens = max_new_tokens or model.config.evaluation.max_new_tokens
    return model.generate([question], [list(images)], tokens)[0]


def run(
    checkpoint: str,
    output: str,
    *,
    task: str | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    quantize: str | None = None,
) -> None:
    """Evaluates a model and prints its table. What is None is as the model's configuration says.

    Raises:
      ConfigError, CheckpointError, DataError: nothing can be evaluated; the message names the flag that mends it.
      runner.Interrupted: Ctrl-C, while questions are answered.
    """
    benchmark = tasks.get(task) if task else None  # a typo is answered before anything is loaded
    console = Console()
    console.print(f"Evaluating {checkpoint}", highlight=False, soft_wrap=True)
    model = load(checkpoint, quantize=quantize)
    defaults = model.config.evaluation
    settings = runner.Settings(
        batch_size=defaults.batch_size if batch_size is None else batch_size,
        max_new_tokens=defaults.max_new_tokens if max_new_tokens is None else max_new_tokens,
        limit=defaults.limit if limit is None else limit,
        quantize=quantize,
    )
    benchmark = benchmark or tasks.get(defaults.task)
    record = runner.evaluate(model, benchmark, settings, epath.Path(output), checkpoint)
    console.print(table(record))
    console.print(f"predictions.jsonl and evaluation.json are in {output}", highlight=False, soft_wrap=True)


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
    """The accuracies of an `evaluation.json`, beside those of a guess without a look."""
    limited = "" if record["complete"] else f", the first {record['n']} questions"
    shown = Table(title=f"{record['model']['name']} on {record['task']}{limited}", title_justify="left")
    for name in ("", "accuracy", "95% interval", "questions", "without a look"):
        shown.add_column(name, justify="right" if name else "left", no_wrap=True)
    majority = record["majority"]
    rows = [("overall", record["overall"]), *record["groups"].items()]
    for name, part in rows:
        guess = f"{majority[name]:.1%}" if name in majority else ""
        shown.add_row(name.replace("_", "/"), *_cells(part), guess)
    shown.add_section()
    for kind, part in record["kinds"].items():
        shown.add_row(kind, *_cells(part), "")
    return shown


def _cells(part: dict[str, Any]) -> tuple[str, str, str]:
    low, high = part["interval"]
    return f"{part['accuracy']:.1%}", f"{low:.1%} to {high:.1%}", str(part["n"])


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is as good as Ctrl-C here."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Makes of SIGTERM what Python makes of Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
