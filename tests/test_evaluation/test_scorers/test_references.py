"""The scores of every benchmark beside those of the published scorers, on random answers (record_references.py)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from saisa_jax.evaluation import scoring
from saisa_jax.evaluation.tasks import TASKS, Item

CASES = json.loads(gzip.decompress((Path(__file__).parents[2] / "data" / "benchmark_scores.json.gz").read_bytes()))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['task']}-{case['school']}")
def test_scores_are_the_published_ones(case: dict[str, Any]) -> None:
    """Every answer's score, and the figures of the whole set, of which those are not always means."""
    task = TASKS[case["task"]].under(case["school"])
    rows = []
    for number, (output, answers, kind, extra, _) in enumerate(case["rows"]):
        item = Item(str(number), "q", tuple(answers), kind=kind, extra=extra)
        line = {"id": item.id, "images": [], "image": None, "kind": kind, "answers": answers, "extra": extra}
        rows.append(line | scoring.answered(task, item, output))
    rows = task.rescore(rows)
    assert len(rows) >= 1000
    wrong = [
        (row["score"], expected, row["output"], row["answers"], row["prediction"])
        for row, (*_, expected) in zip(rows, case["rows"], strict=True)
        if row["score"] != pytest.approx(expected, abs=1e-9)
    ]
    assert wrong == []
    found = scoring.summary(case["task"], task, rows)
    for name, value in case.get("metrics", {}).items():
        ours = found["accuracy"] if name == "overall" else found["metrics"][name]
        assert ours == pytest.approx(value, abs=1e-5 if name == "overall" else 1e-9), name  # 5 digits are printed


def test_what_is_recorded() -> None:
    """Both schools, and right and wrong answers in a fair mixture: a scorer that always says one thing is found."""
    assert len({(case["task"], case["school"]) for case in CASES}) == len(CASES) == 24
    for case in CASES:
        share = sum(row[4] for row in case["rows"]) / len(case["rows"])
        assert 0.02 < share < 0.98, (case["task"], case["school"], share)
