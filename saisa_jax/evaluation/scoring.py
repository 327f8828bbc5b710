"""Scores answers and writes them down: lines of TASK.jsonl, the record TASK.json, files for servers and judges."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from saisa_jax.data.images import image_name
from saisa_jax.data.sample import DataError
from saisa_jax.evaluation import metrics
from saisa_jax.evaluation.results import cluster
from saisa_jax.evaluation.tasks.task import Item, Task, TaskData

INTERVAL = "95%, Wilson's score with the effective number of questions: answers about one image are not independent"

NOWHERE = TaskData()


def question(item: Item, asked: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The fields of a question's line that tell of the question; `asked`: of how it was put."""
    images = [image_name(image) for image in item.images]
    return {
        "id": item.id,
        "image": images[0] if images else None,
        "images": images,
        "question": item.question,
        **(asked or {}),
        "answers": list(item.answers),
        "kind": item.kind,
    } | ({"extra": dict(item.extra)} if item.extra else {})


def answered(task: Task, item: Item, output: str | DataError) -> dict[str, Any]:
    """The fields of a question's line that tell of its answer.

    Args:
      output: what the model says, or why it was not asked.
    """
    if isinstance(output, DataError):
        return {"output": None, "prediction": None, "score": None, "error": output.reason}
    score = float(task.score(output, item)) if item.answers else None
    if score is not None and not 0 <= score <= 1:
        raise ValueError(f"the score of {item.id} is {score}, not from 0 to 1")
    return {"output": output, "prediction": task.parse(output, item), "score": score}


def summary(
    name: str, task: Task, predictions: Sequence[Mapping[str, Any]], data: TaskData = NOWHERE
) -> dict[str, Any]:
    """Accuracies in 0..1, the means of scores: overall, of the task's groups, of every kind; and of an answer without
    the image. They are None where the right answers are not known."""
    asked = [row for row in predictions if "error" not in row]
    failed = {row["id"]: row["error"] for row in predictions if "error" in row}
    if not asked:
        raise DataError(f"none of the {len(failed)} questions of {name} could be asked: {some(list(failed.items()))}")
    scored = [row for row in asked if row["score"] is not None]
    kinds: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in scored:
        if row["kind"]:
            kinds[row["kind"]].append(row)
    unknown = {"accuracy": None, "n": len(asked), "interval": None}
    overall = _accuracy(scored) if scored else unknown
    groups = {
        group: _accuracy(rows)
        for group, belongs in task.groups.items()
        if (rows := [row for row in scored if belongs(row)])
    }
    return {
        "task": name,
        "title": task.title,
        "prompts": task.prompts,
        "metric": task.metric,
        "n": overall["n"],
        "failed": failed,
        "accuracy": overall["accuracy"],
        "interval": overall["interval"],
        **{name: group["accuracy"] for name, group in groups.items()},
        "metrics": dict(task.metrics(scored)) if scored else {},
        "headline": task.headline,
        "overall": overall,
        "groups": groups,
        "kinds": {kind: _accuracy(rows) for kind, rows in sorted(kinds.items())},
        "interval_method": INTERVAL,
        "baseline": dict(task.baseline(data)),
        "note": "" if scored else f"{len(asked)} answers, not scored here: {task.note or 'the data have no answers'}",
        "files": [],
    }


def some(reasons: Sequence[tuple[str, str]], count: int = 3) -> str:
    """A few ids with their reasons, and how many more there are."""
    shown = [f"{name} ({reason[:200]})" if name else reason[:200] for name, reason in reasons[:count]]
    more = len(reasons) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    scores = [row["score"] for row in rows]
    clusters = [cluster(row) for row in rows]
    return {
        "accuracy": sum(scores) / len(scores),
        "n": len(scores),
        "interval": list(metrics.clustered_interval(scores, clusters)),
        "effective_n": metrics.effective_size(scores, clusters),
        "interval_if_independent": list(metrics.wilson(sum(scores), len(scores))),
    }


def commit(
    folder: epath.Path,
    name: str,
    predictions: Sequence[Mapping[str, Any]],
    record: dict[str, Any],
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes NAME.jsonl, the files for servers and judges as NAME.END, and NAME.json last."""
    further = {f"{name}.{end}": content for end, content in (files or {}).items()}
    if further:
        record["files"] = list(further)
    written = {
        f"{name}.jsonl": "".join(json.dumps(row) + "\n" for row in predictions).encode(),
        **further,
        f"{name}.json": (json.dumps(record, indent=2) + "\n").encode(),
    }
    for file, content in written.items():
        (folder / f"{file}.tmp").write_bytes(content)
    (folder / f"{name}.json").unlink(missing_ok=True)
    for file in written:
        (folder / f"{file}.tmp").replace(folder / file)
