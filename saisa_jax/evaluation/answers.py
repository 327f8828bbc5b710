"""`eval.py --answers=FILE`: scores answers that are there already, of whatever program; no model is needed.

FILE is one of
  - our TASK.jsonl                    {"id": ..., "output": ...}
  - lmms-eval's log of samples        {"doc_id": 0, "doc": {...}, "resps": [["B"]], ...}; or .json with "logs"
  - LLaVA's answers                   {"question_id": ..., "text": ...}
  - MMMU's output                     {"validation_Art_1": "B", ...}, or a list of {"id": ..., "response": ...}
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from absl import logging
from etils import epath
from rich.console import Console

import saisa_jax
from saisa_jax.data.sample import DataError
from saisa_jax.evaluation import command, scoring
from saisa_jax.evaluation.runner import read_items
from saisa_jax.evaluation.tasks import TASKS, Item, TaskData

_KEYS = ("id", "question_id", "questionId", "index")
_TEXTS = ("output", "text", "response", "prediction", "answer")


@dataclass(frozen=True)
class Answers:
    """What a file holds.

    Attributes:
      path: the file.
      rows: its rows, in their order, or in that of the documents where lmms-eval numbers them.
      by_lmms: lmms-eval wrote it.
    """

    path: str
    rows: Sequence[Mapping[str, Any]]
    by_lmms: bool


def read_answers(path: str) -> Answers:
    """Reads a file of answers in any of the forms above; DataError if it is none."""
    try:
        text = epath.Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--answers={path} cannot be read: {error}") from error
    try:
        found = json.loads(text)
    except ValueError:
        found = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                found += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise DataError(f"--answers={path}, line {number}: no JSON, or cut: {error}") from error
    if isinstance(found, dict):
        one = "output" in found or "resps" in found  # a file of a single line
        logs = found.get("logs") if isinstance(found.get("logs"), list) else None
        found = [found] if one else logs or [{"id": name, "output": said} for name, said in found.items()]
    rows = [row for row in found if isinstance(row, dict)]
    if not rows or len(rows) < len(found):
        raise DataError(
            f"--answers={path} holds no answers: it must be rows with an id and an answer (see eval.py's docs)"
        )
    by_lmms = all("doc_id" in row or "resps" in row for row in rows)
    if by_lmms and all("doc_id" in row for row in rows):
        rows = sorted(rows, key=lambda row: int(row["doc_id"]))
    return Answers(path, rows, by_lmms)


def match(answers: Answers, items: Sequence[Item]) -> dict[str, Mapping[str, Any]]:
    """{id of an item: its row}, by ids, or by lmms-eval's numbers of documents.

    Raises:
      DataError: two answers to one question, or none to any.
    """
    known = {item.id for item in items}
    named = [next((name for name in ids(row) if name in known), None) for row in answers.rows]
    if not any(named) and answers.by_lmms:
        named = [items[int(row["doc_id"])].id if int(row["doc_id"]) < len(items) else None for row in answers.rows]
    found: dict[str, Mapping[str, Any]] = {}
    for name, row in zip(named, answers.rows, strict=True):
        if name is not None and found.setdefault(name, row) is not row:
            raise DataError(f"--answers={answers.path} has two answers to question {name!r}")
    if not found:
        example = next(iter(ids(answers.rows[0])), "none")
        raise DataError(
            f"no answer of --answers={answers.path} is to a question of --data: its first has the id {example!r}, the "
            f"questions begin with {items[0].id!r}. Is it of another task or split?"
        )
    if strangers := named.count(None):
        logging.warning("%d answers of %s are to no question that is asked", strangers, answers.path)
    return found


def ids(row: Mapping[str, Any]) -> list[str]:
    """The ids that a row may have: its own, its document's, and those in what lmms-eval's metrics put down."""
    places = [row, *(value for value in row.values() if isinstance(value, dict))]
    return [str(place[key]) for place in places for key in _KEYS if key in place]


def output_of(row: Mapping[str, Any]) -> str | DataError:
    """A row's answer as the model gave it, or why there is none."""
    if row.get("error"):
        return DataError(str(row["error"]))
    said = next((row[key] for key in ("resps", "filtered_resps", *_TEXTS) if row.get(key) is not None), None)
    while isinstance(said, list) and said and (len(said) == 1 or isinstance(said[0], list)):
        said = said[0]
    if isinstance(said, list):
        said = "\n".join(map(str, said))
    return DataError("the file has no answer") if said is None else str(said)


def logged_parse(row: Mapping[str, Any]) -> str | None:
    """What lmms-eval read in the answer, where its log says so."""
    for value in row.values():
        if isinstance(value, dict) and "parsed_pred" in value:
            parsed = value["parsed_pred"]
            parsed = parsed[0] if isinstance(parsed, list) and parsed else parsed
            return parsed if isinstance(parsed, str) else None
    return None


def score_file(
    name: str, path: str, output: str, *, data: str = "", images: str = "", prompts: str = "", limit: int | None = None
) -> dict[str, Any]:
    """Scores a file of answers to a task, writes NAME.jsonl and NAME.json into `output/evaluation` and prints a table.

    Args:
      prompts: the school of scores; "": lmms if lmms-eval wrote the file, else llava.

    Raises:
      UserError: a file or data that cannot be used.
    """
    task = TASKS[name]
    answers = read_answers(path)
    prompts = prompts or ("lmms" if answers.by_lmms else "llava")
    task = task.under(prompts)
    place = TaskData(data, images, prompts=prompts, task=name, log=tuple(answers.rows))
    items = read_items(task, place, limit, pictures=False)
    found = match(answers, items)
    rows = [_row(item, found.get(item.id)) for item in items]
    for row, item in zip(rows, items, strict=True):
        said = DataError(f"no answer in {path}") if item.id not in found else output_of(found[item.id])
        row |= scoring.answered(task, item, said)
    if broken := sum(str(row["output"]).startswith("[LMMS_EVAL_REQUEST_FAILED") for row in rows):
        logging.warning("%d answers of %s are lmms-eval's words for a failed request; they are scored", broken, path)
    predictions = task.rescore(rows)
    record = scoring.summary(name, task, predictions) | {
        "answers": path,
        "checkpoint": path,
        "stage": "",
        "model": {"name": epath.Path(path).name},
        "settings": {"data": data, "images": images, "limit": limit, "prompts": prompts, "max_new_tokens": None},
        "complete": limit is None,
        "versions": {"python": platform.python_version(), "saisa_jax": saisa_jax.__version__},
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    folder = epath.Path(output) / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    scoring.commit(folder, name, predictions, record, task.files(predictions, place))
    command.show(Console(), record, output)
    return record


def _row(item: Item, given: Mapping[str, Any] | None) -> dict[str, Any]:
    if given is not None and (parsed := logged_parse(given)) is not None:
        item = dataclasses.replace(item, extra={**item.extra, "logged": parsed})
    return scoring.question(item)
