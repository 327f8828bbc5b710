"""OCRBench: 1,000 questions about text in pictures; right if an answer stands in the output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from saisa_jax.evaluation.benchmark_files import BenchmarkFiles
from saisa_jax.evaluation.scorers.words import contains_text
from saisa_jax.evaluation.tasks import TASKS
from saisa_jax.evaluation.tasks.task import Item, Row, Task, TaskData

FILES = BenchmarkFiles(("ocrbench",), "echo840/OCRBench", ("test",))


def items(data: TaskData) -> Iterator[Item]:
    table = FILES.find(data).table(("question", "answer", "image", "dataset", "question_type"))
    for number in range(len(table)):
        row = table[number]
        answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        name, extra = table.name(number), {"dataset": row["dataset"]}
        yield Item(name, row["question"].strip(), tuple(answers), (row["image"],), row["question_type"], extra=extra)


def score(output: str, item: Item, fold: bool) -> float:
    formula = item.extra["dataset"] == "HME100k"
    return float(any(contains_text(output, answer, formula=formula, fold=fold) for answer in item.answers))


def total(rows: Sequence[Row]) -> Mapping[str, float]:
    return {"of 1000": sum(row["score"] for row in rows)}


TASKS.register("ocrbench")(
    Task(
        title="OCRBench",
        items=items,
        score=lambda output, item: score(output, item, fold=False),
        metric="contains the answer",
        metrics=total,
        headline="of 1000",
        schools={"llava": {}, "lmms": {"score": lambda output, item: score(output, item, fold=True)}},
    )
)
