"""Reading finished evaluations: `OUTPUT/evaluation/TASK.json` with the answers in `TASK.jsonl`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from etils import epath

from saisa_jax.errors import UserError


class ResultError(UserError, ValueError):
    """Results that are not there, not whole, or cannot be compared."""


@dataclass(frozen=True)
class Result:
    """One finished evaluation.

    Attributes:
      path: of its TASK.json.
      record: what is in it.
      rows: the lines of TASK.jsonl by question id; one that could not be asked has no score.
    """

    path: epath.Path
    record: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Any]]

    @property
    def task(self) -> str:
        return self.record["task"]


def find_results(place: str | os.PathLike[str]) -> dict[str, epath.Path]:
    """{task: path of its TASK.json} of a TASK.json, a folder of them, or the output folder that holds `evaluation`.

    Raises:
      ResultError: there is none; the message says what is there instead.
    """
    where = epath.Path(place)
    if where.suffix == ".json":
        if not where.exists():
            raise ResultError(f"{where}: there is no such file{_hint(where.parent)}")
        return {where.stem: where}
    folders = [folder for folder in (where, where / "evaluation") if folder.is_dir()]
    if not folders:
        raise ResultError(f"{where} is neither a TASK.json nor a folder")
    for folder in folders:
        if found := _in_folder(folder):
            return found
    raise ResultError(f"{where} holds no finished evaluation{_hint(folders[-1])}")


def _in_folder(folder: epath.Path) -> dict[str, epath.Path]:
    return {
        path.stem: path for path in sorted(folder.glob("*.json")) if path.with_suffix(".jsonl").exists()
    }  # fmt: skip


def _hint(folder: epath.Path) -> str:
    if not folder.is_dir():
        return ""
    if there := _in_folder(folder):
        return f"; in {folder} are {', '.join(f'{name}.json' for name in there)}"
    begun = [path.name for path in sorted(folder.glob("*.partial.jsonl"))]
    return f": {', '.join(begun)} is not finished; the same eval.py command goes on" if begun else ""


def read_result(path: str | os.PathLike[str]) -> Result:
    """Reads a TASK.json and the TASK.jsonl beside it.

    Raises:
      ResultError: a file that is missing, cut short or not of this form, or two files that do not belong together.
    """
    path = epath.Path(path)
    lines = path.with_suffix(".jsonl")
    again = f"evaluate again: python eval.py --tasks={path.stem} ..."
    for file in (path, lines):
        if not file.exists():
            raise ResultError(f"{file}: there is no such file; {path.name} and {lines.name} belong together")
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ResultError(f"{path} is no whole JSON file ({error}); {again}") from error
    if not isinstance(record, dict) or not {"task", "n", "accuracy"} <= record.keys():
        raise ResultError(f"{path} is not what eval.py writes: it has no task, n and accuracy")
    rows: dict[str, Any] = {}
    for number, line in enumerate(lines.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            name, _ = row["id"], row["score"]
        except (ValueError, KeyError, TypeError) as error:
            raise ResultError(f"{lines} line {number} is no answer ({error!r}); {again}") from error
        if name in rows:
            raise ResultError(f"{lines} line {number} is a second answer to {name!r}; {again}")
        rows[name] = row
    asked = [row for row in rows.values() if "error" not in row]
    scored = sum(row["score"] is not None for row in asked)
    if (scored or len(asked)) != record["n"]:  # where a server has the answers, none is scored
        raise ResultError(f"{lines} holds {scored} scored answers and {path.name} is of {record['n']}; {again}")
    return Result(path, record, rows)


def cluster(row: Mapping[str, Any]) -> Any:
    """What an answer shares with others: its pictures, which are seen rightly or wrongly for all of them; a question of
    text alone stands for itself."""
    return tuple(row["images"]) or row["id"]
