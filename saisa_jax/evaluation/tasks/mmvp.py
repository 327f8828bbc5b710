"""MMVP: 150 pairs of pictures that CLIP takes for alike; the same question, opposite answers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from saisa_jax.evaluation.benchmark_files import BenchmarkFiles, need, read_table
from saisa_jax.evaluation.prompts import LETTER, options
from saisa_jax.evaluation.scorers.letters import mmvp
from saisa_jax.evaluation.tasks import TASKS
from saisa_jax.evaluation.tasks.task import Item, Row, Task, TaskData

COLUMNS = ("Index", "Question", "Options", "Correct Answer")
FILES = BenchmarkFiles(
    ("mmvp",), "lmms-lab-eval/MMVP", ("train", "test"), ("Questions.csv",), "MMVP/MMVP of the Hub (with MMVP Images)"
)
_OPTION = re.compile(r"\([a-z]\)\s*([^(]+?)(?=\s*\([a-z]\)|$)", re.IGNORECASE)


def items(data: TaskData) -> Iterator[Item]:
    place = FILES.find(data)
    if place.questions:
        for row in read_table(place.questions, ","):
            for name in COLUMNS:
                need(row, name, place.questions)
            yield _item(row, place.picture("MMVP Images", f"{row['Index']}.jpg"))
        return
    table = place.table((*COLUMNS, "image"))
    for number in range(len(table)):
        row = table[number]
        yield _item(row, row["image"])


def _item(row: Mapping[str, Any], image: Any) -> Item:
    texts = [text.strip() for text in _OPTION.findall(row["Options"])]
    answer = row["Correct Answer"].strip().lower()
    right = next((letter for letter in "AB" if f"({letter.lower()})" in answer), answer.upper())
    index = int(row["Index"])  # from 1
    question = f"{row['Question']}\n{options(texts)}{LETTER}"
    return Item(str(index), question, (right,), (image,), extra={"pair": (index - 1) // 2})


def pairs(rows: Sequence[Row]) -> Mapping[str, float]:
    """The share of pairs with both right, of those that are whole."""
    scores: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        scores[row["extra"]["pair"]].append(row["score"])
    whole = [pair for pair in scores.values() if len(pair) == 2]
    return {"pairs": sum(map(min, whole)) / len(whole)} if whole else {}


TASKS.register("mmvp")(
    Task(
        title="MMVP",
        items=items,
        score=lambda output, item: float(mmvp(output) == item.answers[0]),
        metric="letter",
        parse=lambda output, item: mmvp(output),
        metrics=pairs,
        headline="pairs",
        schools={"llava": {}, "lmms": {}},
    )
)
