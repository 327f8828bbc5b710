"""All finished evaluations of one model in a folder as one table: for the terminal, as JSON, and ready to paste."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from rich.table import Table

from saisa_jax import buckets
from saisa_jax.evaluation.results import ResultError, find_results, read_result

COLUMNS = ("task", "metric", "score", "95% interval", "questions", "further")


def collect(folder: epath.Path, checkpoint: str, stage: str) -> list[dict[str, Any]]:
    """The records in OUTPUT/evaluation that are of one model; files that are not whole are left out."""
    records = []
    try:
        found = find_results(folder)
    except ResultError:
        return []
    for path in found.values():
        try:
            record = dict(read_result(path).record)
        except ResultError:
            continue
        if (record.get("checkpoint"), record.get("stage")) == (checkpoint, stage):
            records.append(record)
    return records


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What summary.json holds: what the evaluations have in common, and a line for each task."""
    first = records[0]
    keys = (
        "task",
        "title",
        "prompts",
        "metric",
        "n",
        "accuracy",
        "interval",
        "effective_n",
        "metrics",
        "headline",
        "complete",
    )
    return {
        "model": first["model"],
        "checkpoint": first["checkpoint"],
        "stage": first["stage"],
        "interval_method": first["interval_method"],
        "tasks": [
            {key: {**record["overall"], **record}[key] for key in keys if key in {**record["overall"], **record}}
            | {"failed": len(record["failed"]), "max_new_tokens": record["settings"]["max_new_tokens"]}
            | {"versions": record["versions"], "finished": record["finished"]}
            for record in records
        ],
    }


def table(records: Sequence[Mapping[str, Any]]) -> Table:
    """The same for a terminal."""
    shown = Table(title=f"{records[0]['model']['name']}, all tasks", title_justify="left")
    for name in COLUMNS:
        shown.add_column(name, justify="left" if name in ("task", "metric", "further") else "right", overflow="fold")
    for row in _rows(records):
        shown.add_row(*row)
    return shown


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """The same as a table in Markdown."""
    align = ["---" if name in ("task", "metric", "further") else "---:" for name in COLUMNS]
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (COLUMNS, align, *_rows(records))]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _rows(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    rows = []
    for record in records:
        school = f" ({record['prompts']})" if record.get("prompts") else ""
        count = f"{record['n']:,}{'' if record['complete'] else ', the first'}"
        if record["failed"]:
            count += f", {len(record['failed'])} failed"
        names = sorted(record["metrics"], key=lambda name: name != record.get("headline"))  # what is quoted comes first
        further = ", ".join(f"{name} {record['metrics'][name]:.4g}" for name in names)
        score = interval = "-"  # the answers lie on a server
        if record["accuracy"] is not None:
            low, high = record["interval"]
            score, interval = f"{100 * record['accuracy']:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"
        rows.append((f"{record['task']}{school}", record["metric"], score, interval, count, further))
    return rows


def write(folder: epath.Path, checkpoint: str, stage: str) -> list[dict[str, Any]]:
    """Writes summary.json and summary.md of a model's evaluations in a folder, and returns their records."""
    records = collect(folder, checkpoint, stage)
    if records:
        texts = {"summary.json": json.dumps(summary(records), indent=2) + "\n", "summary.md": markdown(records)}
        for name, text in texts.items():
            buckets.write_text(folder / name, text)
    return records
