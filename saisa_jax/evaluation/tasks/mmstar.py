"""MMStar: 1,500 multiple-choice questions that need their image, of 18 abilities."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from saisa_jax.evaluation.benchmark_files import BenchmarkFiles
from saisa_jax.evaluation.prompts import LETTER
from saisa_jax.evaluation.scorers.letters import find_letter, mmstar_authors
from saisa_jax.evaluation.tasks import TASKS
from saisa_jax.evaluation.tasks.task import Item, Row, Task, TaskData

FILES = BenchmarkFiles(("mmstar",), "Lin-Chen/MMStar", ("val", "validation"))


def items(data: TaskData) -> Iterator[Item]:
    table = FILES.find(data).table(("index", "question", "image", "answer", "category", "l2_category"))
    # lmms-eval has the sentence without its full stop.
    end = LETTER if data.prompts == "llava" else LETTER.removesuffix(".")
    for number in range(len(table)):
        row = table[number]
        question = row["question"].strip().replace(" Please answer yes or no.", "") + end
        answer, extra = row["answer"].strip().upper(), {"l2_category": row["l2_category"]}
        yield Item(str(row["index"]), question, (answer,), (row["image"],), row["category"], extra=extra)


def metrics(rows: Sequence[Row]) -> Mapping[str, float]:
    """lmms-eval's average is the mean over the 18 abilities."""
    parts: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        parts[row["extra"]["l2_category"]].append(row["score"])
    return {"average": sum(sum(part) / len(part) for part in parts.values()) / len(parts)}


TASKS.register("mmstar")(
    Task(
        title="MMStar",
        items=items,
        score=lambda output, item: float(mmstar_authors(output) == item.answers[0]),
        metric="letter",
        parse=lambda output, item: mmstar_authors(output),
        metrics=metrics,
        schools={
            "llava": {},
            "lmms": {
                "score": lambda output, item: float(find_letter(output, "ABCD") == item.answers[0]),
                "parse": lambda output, item: find_letter(output, "ABCD"),
                "headline": "average",
            },
        },
    )
)
