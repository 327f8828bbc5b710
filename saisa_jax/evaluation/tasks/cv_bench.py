"""CV-Bench: counting and relations (2D), depth and distance (3D); multiple choice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from saisa_jax.evaluation.benchmark_files import BenchmarkFiles
from saisa_jax.evaluation.prompts import LETTER
from saisa_jax.evaluation.scorers.letters import LETTERS, cv_bench
from saisa_jax.evaluation.tasks import TASKS
from saisa_jax.evaluation.tasks.task import Item, Row, Task, TaskData

FILES = BenchmarkFiles(("cv_bench", "cvbench"), "nyu-visionx/CV-Bench", ("test",))
COLUMNS = ("idx", "prompt", "choices", "image", "answer", "type?", "task", "source")


def items(data: TaskData) -> Iterator[Item]:
    table = FILES.find(data).table(COLUMNS)
    for number in range(len(table)):
        row = table[number]
        letters = ", ".join(LETTERS[: len(row["choices"])])
        note = f"Note: You only need to respond with {letters} without providing any additional information.\n\n"
        question = row["prompt"] + LETTER if data.prompts == "llava" else note + row["prompt"]
        answer = row["answer"].strip("()")
        name, extra = f"{row['source']}/{row['idx']}", {"source": row["source"]}
        yield Item(name, question, (answer,), (row["image"],), row["task"], extra=extra)


def metrics(rows: Sequence[Row]) -> Mapping[str, float]:
    """The authors' figure: the mean of 2D and 3D, 2D being that of ADE20K and COCO."""
    parts: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        parts[row["extra"]["source"]].append(row["score"])
    mean = {source: sum(part) / len(part) for source, part in parts.items()}
    if not {"ADE20K", "COCO", "Omni3D"} <= mean.keys():
        return mean
    flat = (mean["ADE20K"] + mean["COCO"]) / 2
    return mean | {"2D": flat, "3D": mean["Omni3D"], "2D and 3D": (flat + mean["Omni3D"]) / 2}


TASKS.register("cv_bench")(
    Task(
        title="CV-Bench",
        items=items,
        score=lambda output, item: float(cv_bench(output) == item.answers[0]),
        metric="letter",
        parse=lambda output, item: cv_bench(output),
        metrics=metrics,
        headline="2D and 3D",
        schools={"llava": {}, "lmms": {"headline": ""}},
    )
)
