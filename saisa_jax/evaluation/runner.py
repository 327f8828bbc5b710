"""Runs a benchmark on a finished model: every question by free generation, scored, written down.

    OUTPUT/predictions.jsonl            one question a line, in the benchmark's order
    OUTPUT/evaluation.json              the accuracies, with intervals, and what an answer costs
    OUTPUT/predictions.partial.jsonl    while it runs, and after a run that was stopped: a line that says what is
                                        answered with what, and the answers so far, in any order

Both files appear when all is answered, `evaluation.json` last; it is never there without the predictions it is of.
Stopped or killed, the same evaluation goes on: batches that were answered are not answered again, and the others are
the same batches, so that the answers are those of an undisturbed one.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import jax
from absl import logging
from etils import epath

import saisa_jax
from saisa_jax import flops
from saisa_jax.checkpoints import checksums
from saisa_jax.config import ConfigError, to_dict
from saisa_jax.data.sample import USER, Turn
from saisa_jax.evaluation import metrics
from saisa_jax.evaluation.progress import Progress
from saisa_jax.evaluation.tasks import Item, Task
from saisa_jax.inference.model import VisionLanguageModel

INTERVAL = "95%, Wilson's score with the effective number of questions: answers about one image are not independent"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to run a benchmark.

    Attributes:
      batch_size: questions that are answered at once.
      max_new_tokens: of an answer.
      limit: only the first so many questions; None: all.
      quantize: how the weights were rounded; for the record.
    """

    batch_size: int = 64
    max_new_tokens: int = 16
    limit: int | None = None
    quantize: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name}={getattr(self, name)} must be at least 1")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit={self.limit} must be at least 1; leave it out for all questions")


class Interrupted(RuntimeError):
    """The evaluation was stopped; the message says where the answers so far are."""


def evaluate(
    model: VisionLanguageModel, task: Task, settings: Settings, output: epath.Path, checkpoint: str
) -> dict[str, Any]:
    """Answers a benchmark's questions and writes `predictions.jsonl` and `evaluation.json` into `output`.

    Args:
      model: the model.
      task: the benchmark.
      settings: batch size and limits.
      output: a directory; made if it is not there. A former evaluation in it is replaced when this one is complete.
      checkpoint: where the model lies; goes into the record.

    Returns:
      what is in `evaluation.json`.

    Raises:
      Interrupted: Ctrl-C, or whatever else raised KeyboardInterrupt. The next run goes on.
    """
    items = task.items()[: settings.limit]
    output.mkdir(parents=True, exist_ok=True)
    partial = output / "predictions.partial.jsonl"
    started = time.monotonic()
    header = {"of": _identity(model, task, settings)}
    rows = _answered_before(partial, header)
    try:
        with partial.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in (header, *rows.values()))
            for batch in _answers(model, task, items, settings, rows.copy()):
                rows |= {row["id"]: row for row in batch}
                file.writelines(json.dumps(row) + "\n" for row in batch)
                file.flush()
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"stopped after {len(rows)} of {len(items)} questions. The answers so far are in {partial}; "
            "the same command goes on"
        ) from error
    predictions = [rows[item.id] for item in items]
    record = _summary(task, predictions)
    record |= _costs(model, predictions) | {"seconds": time.monotonic() - started}
    record |= {"settings": dataclasses.asdict(settings), "complete": settings.limit is None}
    record |= _origin(model, checkpoint)
    _commit(output, predictions, record)
    partial.unlink()
    return record


def _identity(model: VisionLanguageModel, task: Task, settings: Settings) -> dict[str, Any]:
    """What all answers of one evaluation have in common."""
    identity = {"config": to_dict(model.config), "stage": model.stage, "params": checksums(model.params)}
    return {
        "task": task.name,
        "settings": dataclasses.asdict(settings),
        "model": zlib.crc32(json.dumps(identity, sort_keys=True).encode()),
        "version": saisa_jax.__version__,
    }


def _answered_before(partial: epath.Path, header: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{id: prediction} that a stopped run of the same evaluation has left."""
    if not partial.exists():
        return {}
    first, *lines = partial.read_text().splitlines(keepends=True) or [""]
    if first.rstrip() != json.dumps(header):
        logging.warning("%s is of another model or other settings, and is written anew", partial)
        return {}
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may have cut the last one short
    logging.warning("%d questions were answered before; the evaluation goes on", len(rows))
    return {row["id"]: row for row in rows}


def _answers(
    model: VisionLanguageModel,
    task: Task,
    items: Sequence[Item],
    settings: Settings,
    before: Mapping[str, dict[str, Any]],
) -> Iterator[list[dict[str, Any]]]:
    """Predictions of a batch after the other, shortest prompts first: a batch is compiled for a bucket of lengths, so
    there are few kinds. A batch that was answered `before` as a whole is left out."""
    different = {_key(item): item for item in items}
    prompts = {key: _prompt(model, item) for key, item in different.items()}
    order = sorted(items, key=lambda item: len(prompts[_key(item)]))
    size = min(settings.batch_size, len(order))
    with Progress(task.name, len(order)) as progress:
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            if all(item.id in before for item in batch):
                progress.update(len(batch), sum(before[item.id]["correct"] for item in batch))
                continue
            # The last batch is filled up, so that it needs no program of its own.
            filled = [*batch, *batch[-1:] * (size - len(batch))]
            outputs = model.generate(
                [item.question for item in filled], [list(item.images) for item in filled], settings.max_new_tokens
            )
            rows = [
                _prediction(model, task, item, output, prompts[_key(item)])
                for item, output in zip(batch, outputs, strict=False)
            ]
            yield rows
            progress.update(len(batch), sum(row["correct"] for row in rows))


def _prediction(
    model: VisionLanguageModel, task: Task, item: Item, output: str, prompt: Sequence[int]
) -> dict[str, Any]:
    return {
        "id": item.id,
        "image": item.images[0] if item.images else None,
        "images": list(item.images),
        "question": item.question,
        "prompt": model.tokenizer.decode(list(prompt), skip_special_tokens=False),
        "prompt_tokens": len(prompt),
        "output": output,
        "answer": metrics.normalise(output),
        "truth": item.truth,
        "correct": task.score(output, item.truth),
        "kind": item.kind,
    }


def _key(item: Item) -> tuple[str, int]:
    """What an item's prompt depends on."""
    return item.question, len(item.images)


def _prompt(model: VisionLanguageModel, item: Item) -> list[int]:
    """The text tokens of an item's prompt."""
    return model.prompt((Turn(USER, item.question),), len(item.images), name=item.id).tokens.tolist()


# --- the record ------------------------------------------------------------------------------------------------------


def _summary(task: Task, predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies in 0..1: overall, of the task's groups, of every kind; and of a guess without a look."""
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in predictions:
        kinds[row["kind"]].append(row)
    overall = _accuracy(predictions)
    groups = {
        name: _accuracy(rows)
        for name, belongs in task.groups.items()
        if (rows := [row for row in predictions if belongs(row["kind"])])
    }
    return {
        "task": task.name,
        "title": task.title,
        "n": len(predictions),
        "accuracy": overall["accuracy"],
        "interval": overall["interval"],
        **{name: group["accuracy"] for name, group in groups.items()},
        "overall": overall,
        "groups": groups,
        "kinds": {kind: _accuracy(rows) for kind, rows in sorted(kinds.items())},
        "interval_method": INTERVAL,
        "majority": task.baseline(),
    }


def _accuracy(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    correct = [bool(row["correct"]) for row in rows]
    images = [tuple(row["images"]) for row in rows]
    return {
        "accuracy": sum(correct) / len(correct),
        "n": len(correct),
        "interval": list(metrics.clustered_interval(correct, images)),
        "effective_n": metrics.effective_size(correct, images),
        "interval_if_independent": list(metrics.wilson(sum(correct), len(correct))),
    }


def _costs(model: VisionLanguageModel, predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """FLOPs of reading the mean question. The image slots of a blind run are empty, and computed all the same."""
    tokens = statistics.fmean(row["prompt_tokens"] for row in predictions)
    images = max(len(row["images"]) for row in predictions)
    flops_of = {
        name: flops.prefill(model.model_config, round(tokens), images, convention=name).total
        for name in flops.CONVENTIONS
    }
    return {"prompt_tokens": tokens, "images_per_question": images, "prefill_flops": flops_of}


def _origin(model: VisionLanguageModel, checkpoint: str) -> dict[str, Any]:
    packages = ("jax", "jaxlib", "flax", "numpy")
    return {
        "checkpoint": checkpoint,
        "stage": model.stage,
        "model": {
            "name": model.config.name,
            "alignment": model.model_config.alignment,
            "blind": model.config.data.blind,
        }
        | dict(model.metadata),
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version(), "saisa_jax": saisa_jax.__version__}
        | {name: version(name) for name in packages},
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit(output: epath.Path, predictions: Sequence[dict[str, Any]], record: dict[str, Any]) -> None:
    files = {
        "predictions.jsonl": "".join(json.dumps(row) + "\n" for row in predictions),
        "evaluation.json": json.dumps(record, indent=2) + "\n",
    }
    for name, text in files.items():
        (output / f"{name}.tmp").write_text(text)
    (output / "evaluation.json").unlink(missing_ok=True)
    for name in files:
        (output / f"{name}.tmp").replace(output / name)
