"""What `eval.py` does with its flags."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from etils import epath
from rich.console import Console
from rich.table import Table

from saisa_jax.checkpoints import local_model
from saisa_jax.config import STAGES, ConfigError
from saisa_jax.evaluation import overview, runner
from saisa_jax.evaluation.tasks import TASKS
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
    tasks: Sequence[str] = (),
    data: str = "",
    images: str = "",
    limit: int | None = None,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    quantize: str | None = None,
    prompts: str = "llava",
) -> None:
    """Evaluates a model and prints a table for each task. What is empty or None is as the model's configuration says.

    Raises:
      UserError: nothing can be evaluated; the message names the flag that fixes it.
      runner.Interrupted: Ctrl-C, while questions are answered.
    """
    for name in tasks:
        _ = TASKS[name]  # a typo is answered before anything is loaded
    if images and not data:
        raise ConfigError(f"--images={images} needs --data=FILE, whose pictures it holds")
    console = Console()
    console.print(f"Evaluating {checkpoint}", highlight=False, soft_wrap=True)
    model = load(checkpoint, quantize=quantize)
    defaults = model.config.evaluation
    tasks = tuple(dict.fromkeys(tasks or defaults.tasks))
    if not tasks:
        raise ConfigError(
            f"the recipe names no benchmark (evaluation.tasks): choose with --tasks=NAME,NAME from {', '.join(TASKS)}"
        )
    settings = runner.Settings(
        batch_size=defaults.batch_size if batch_size is None else batch_size,
        max_new_tokens=defaults.max_new_tokens if max_new_tokens is None else max_new_tokens,
        limit=defaults.limit if limit is None else limit,
        quantize=quantize,
        data=data,
        images=images,
        prompts=prompts,
    )
    for name in tasks:
        tokens = max_new_tokens or TASKS[name].max_new_tokens or defaults.max_new_tokens
        settings = dataclasses.replace(settings, max_new_tokens=tokens)
        record = runner.evaluate(model, name, settings, epath.Path(output), checkpoint)
        show(console, record, output)
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
