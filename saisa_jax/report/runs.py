"""A run's directory, read for the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from etils import epath

from saisa_jax.checkpoints import local_model
from saisa_jax.config import Config, ConfigError, ModelConfig, from_saved
from saisa_jax.errors import UserError

NAMES = {"saisa": "SAISA", "naavit": "NAAViT", "llava": "LLaVA", "flamingo": "Flamingo"}
TITLES = {"pretrain": "Stage 1: pretrain", "finetune": "Stage 2: finetune"}

TIMES = "bench_image.json"


class ReportError(UserError, ValueError):
    """There is nothing to report; the message says which command makes it."""


@dataclass(frozen=True)
class StageRecord:
    """One stage of training.

    Attributes:
      name: pretrain | finetune.
      train: rows of metrics.jsonl of kind "train", by step.
      held_out: those of kind "eval".
      summary: summary.json; None while the stage is not finished.
    """

    name: str
    train: tuple[dict[str, Any], ...]
    held_out: tuple[dict[str, Any], ...]
    summary: dict[str, Any] | None


@dataclass(frozen=True)
class Run:
    """One run, as far as it has come.

    Attributes:
      directory: as it was named.
      label: its name on the page, unlike those of the other runs.
      number: of its colour and marker; runs that differ in nothing but the seed have one number.
      config: its configuration; `raw` is the file as it stands.
      stages: those that have begun.
      evaluation: evaluation/TASK.json of one benchmark, or None.
      predictions: the lines of its TASK.jsonl that have a score.
      times: what `bench image --output=DIRECTORY/bench_image.json` measured, or None.
      notices: what is missing, and which command makes it.
    """

    directory: str
    label: str
    config: Config
    raw: dict[str, Any]
    stages: tuple[StageRecord, ...]
    evaluation: dict[str, Any] | None
    predictions: tuple[dict[str, Any], ...]
    notices: tuple[str, ...] = field(default=())
    times: dict[str, Any] | None = None
    number: int = 0

    @property
    def recipe(self) -> dict[str, Any]:
        """Its configuration without the seed."""
        return {name: value for name, value in self.raw.items() if name != "seed"}

    @property
    def model(self) -> ModelConfig:
        """The model as its last stage sees it."""
        return self.config.model_for(self.config.stages[-1])

    @property
    def model_directory(self) -> str | None:
        """The directory of the last finished stage's model."""
        for stage in reversed(self.config.stages):
            path = local_model(self.directory, stage)
            if path.exists():
                return str(path)
        return None

    @property
    def train_flops(self) -> float | None:
        """Of all stages together; None while one is not finished."""
        return self._sum("train_flops")

    @property
    def wall_seconds(self) -> float | None:
        """Of training, all stages together; None while one is not finished."""
        return self._sum("wall_seconds")

    @property
    def first_question(self) -> list[float] | None:
        """Seconds until the answer to a first question about a picture begins, as often as they were measured."""
        return self.times["first"] if self.times else None

    @property
    def parameters(self) -> int | None:
        summary = self.stages[-1].summary
        return summary["parameters"] if summary else None

    def _sum(self, key: str) -> float | None:
        summaries = [stage.summary for stage in self.stages if stage.summary]
        if len(summaries) < len(self.config.stages):
            return None
        return sum(summary[key] for summary in summaries)


def read_runs(directories: Sequence[str]) -> list[Run]:
    """Reads runs, with the benchmark of the first that was evaluated; runs of one label get their directory's name.

    Raises:
      ReportError: one of them has not begun.
    """
    runs: list[Run] = []
    for directory in directories:
        task = next((run.evaluation["task"] for run in runs if run.evaluation), None)
        runs.append(read_run(directory, task))
    labels, recipes = [run.label for run in runs], [run.recipe for run in runs]
    different = [recipe for number, recipe in enumerate(recipes) if recipe not in recipes[:number]]
    return [
        replace(
            run,
            label=f"{run.label} ({epath.Path(run.directory).name})" if labels.count(run.label) > 1 else run.label,
            number=different.index(run.recipe),
        )
        for run in runs
    ]


def seeds(runs: Sequence[Run]) -> dict[int, list[Run]]:
    """Runs that differ in nothing but the seed, by their number."""
    together: dict[int, list[Run]] = {}
    for run in runs:
        together.setdefault(run.number, []).append(run)
    return together


def read_run(directory: str, task: str | None = None) -> Run:
    """Reads one run, with its evaluation on `task`; None: on the recipe's first that is there, else on any.

    Raises:
      ReportError: no run has begun there, or a file is not what it should be.
    """
    where = epath.Path(directory)
    make = f"python train.py --config=... --workdir={directory}"
    if not (where / "config.json").exists():
        raise ReportError(f"{directory} is no run: it has no config.json. {make} makes one")
    raw = _json(where / "config.json")
    try:
        config = from_saved(raw)
    except ConfigError as error:
        raise ReportError(f"{where / 'config.json'} is not of this version: {error}. {make} makes a new one") from error
    stages = tuple(_stage(where, name) for name in config.stages if (where / name / "metrics.jsonl").exists())
    if not any(stage.train for stage in stages):
        raise ReportError(f"{directory} holds no training metrics yet. {make} makes them")
    notices = []
    unfinished = [name for name in config.stages if not (where / name / "summary.json").exists()]
    if unfinished:
        notices.append(f"{' and '.join(unfinished)} not finished: {make} resumes it")
    evaluation, predictions = None, ()
    evaluated = _evaluated(where / "evaluation", config.evaluation.tasks)
    chosen = task or next(iter(evaluated), None)
    if chosen in evaluated:
        path = where / "evaluation" / f"{chosen}.json"
        evaluation = _json(path)
        predictions = tuple(row for row in _lines(path.with_suffix(".jsonl")) if row["score"] is not None)
        if others := [name for name in evaluated if name != chosen]:
            notices.append(f"shown is {chosen}; also evaluated: {', '.join(others)}")
        if evaluation["stage"] != config.stages[-1]:
            notices.append(
                f"the evaluation is of the model after {evaluation['stage']}: python eval.py --workdir={directory} "
                f"evaluates it after {config.stages[-1]}, when that is finished"
            )
        if not evaluation["complete"]:
            notices.append(f"evaluated on the first {evaluation['n']} questions only (--limit)")
        if evaluation["failed"]:
            notices.append(f"{len(evaluation['failed'])} questions could not be asked and count nowhere")
    else:
        on = f" on {chosen}" if chosen else ""
        flag = f" --tasks={chosen or 'NAME'}" if chosen or not config.evaluation.tasks else ""
        notices.append(f"not evaluated{on} yet: python eval.py --workdir={directory}{flag} does it")
    times = _json(where / TIMES) if (where / TIMES).exists() else None
    return Run(directory, _label(config), config, raw, stages, evaluation, predictions, tuple(notices), times)


def _evaluated(folder: epath.Path, first: Sequence[str]) -> list[str]:
    """Benchmarks whose results are in a folder, those named `first` before others."""
    there = sorted(path.stem for path in folder.glob("*.json")) if folder.exists() else []
    there = [name for name in there if (folder / f"{name}.jsonl").exists()]
    return sorted(there, key=lambda name: first.index(name) if name in first else len(first))


def _label(config: Config) -> str:
    model = config.model
    parts = [NAMES.get(model.alignment, model.alignment)]
    if model.alignment == "flamingo" and model.flamingo.local_text:
        parts.append("local text")
    if model.projector.kind != "mlp":
        parts.append(model.projector.kind.replace("_", " "))
    elif model.alignment == "saisa" and model.projector.sharing == "shared":
        parts.append("one projector")
    if model.visual_layers is not None:
        parts.append(f"{len(model.visual_layers)} of {model.num_layers} layers")
    if config.data.blind:
        parts.append("blind")
    if config.seed:
        parts.append(f"seed {config.seed}")
    return ", ".join(parts)


def _stage(where: epath.Path, name: str) -> StageRecord:
    rows: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "eval": {}}
    for row in _lines(where / name / "metrics.jsonl"):
        rows.get(row["kind"], {})[row["step"]] = row  # a step that was run again after a resume counts once
    summary = where / name / "summary.json"
    train, held_out = (tuple(by_step[step] for step in sorted(by_step)) for by_step in rows.values())
    held_out = tuple(row for row in held_out if "loss" in row)  # others are of `training.eval_tasks` alone
    return StageRecord(name, train, held_out, _json(summary) if summary.exists() else None)


def _json(path: epath.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ReportError(f"{path} is not JSON: {error}; delete it and run again what wrote it") from error


def _lines(path: epath.Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file; a last line that was cut off is left out."""
    lines, rows = path.read_text().splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ReportError(f"{path} line {number} is not JSON: {error}") from error
    return rows
