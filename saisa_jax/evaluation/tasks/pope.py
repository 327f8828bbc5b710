"""POPE on COCO: whether an object is in the picture, in three splits: random, popular and adversarial ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from saisa_jax.data.sample import DataError
from saisa_jax.evaluation.benchmark_files import BenchmarkFiles, Place, need, read_lines
from saisa_jax.evaluation.prompts import SHORT, without
from saisa_jax.evaluation.scorers.yes_no import binary_metrics, pope_llava, pope_lmms
from saisa_jax.evaluation.tasks import TASKS
from saisa_jax.evaluation.tasks.task import Item, Row, Task, TaskData

SPLITS = ("random", "popular", "adversarial")
FILES = BenchmarkFiles(
    ("pope",),
    "lmms-lab-encoder/POPE",
    ("test",),
    ("llava_pope_test.jsonl",),
    "LLaVA's eval.zip, with POPE's output/coco as pope/coco and COCO's val2014 beside it",
)


def items(data: TaskData) -> Iterator[Item]:
    place = FILES.find(data)
    yield from _llava(place) if place.questions else _hub(place)


def _llava(place: Place) -> Iterator[Item]:
    """Labels go to questions by their order within a split, as in LLaVA's script."""
    assert place.questions
    rows = read_lines(place.questions)
    labels = {}
    for split in SPLITS:
        path = place.file(f"coco/coco_pope_{split}.json")
        lines = read_lines(path)
        asked = sum(need(row, "category", place.questions) == split for row in rows)
        if len(lines) != asked:
            raise DataError(f"{path} has {len(lines)} labels for the {asked} questions of {place.questions}")
        labels[split] = iter([need(line, "label", path) for line in lines])
    for row in rows:
        question = without(row["text"], SHORT) + SHORT
        answer = "no" if next(labels[row["category"]]) == "no" else "yes"
        image = place.picture("val2014", row["image"])
        yield Item(str(row["question_id"]), question, (answer,), (image,), row["category"])


def _hub(place: Place) -> Iterator[Item]:
    table = place.table(("question", "answer", "image", "category", "id?", "question_id"))
    for number in range(len(table)):
        row = table[number]
        name = str(row.get("id") or f"{row['category']}/{row['question_id']}")
        question = row["question"].strip() + SHORT
        yield Item(name, question, (row["answer"].lower().strip(),), (row["image"],), row["category"])


def metrics_llava(rows: Sequence[Row]) -> Mapping[str, float]:
    """F1 and accuracy of each split, and their means, which LLaVA reports."""
    found = {}
    for split in SPLITS:
        part = [row for row in rows if row["kind"] == split]
        if part:
            found[split] = binary_metrics([row["prediction"] for row in part], [row["answers"][0] for row in part])
    mean = {f"mean {key}": sum(one[key] for one in found.values()) / len(found) for key in ("f1", "accuracy")}
    return mean | {f"{split} {key}": one[key] for split, one in found.items() for key in one}


def metrics_lmms(rows: Sequence[Row]) -> Mapping[str, float]:
    """Of all questions at once. Its yes_ratio is of the right answers, not of the model's, as there."""
    answers = [row["answers"][0] for row in rows]
    return binary_metrics([row["prediction"] for row in rows], answers) | {
        "yes_ratio": answers.count("yes") / len(answers)
    }


TASKS.register("pope")(
    Task(
        title="POPE",
        items=items,
        score=lambda output, item: float(pope_llava(output) == item.answers[0]),
        metric="accuracy",
        parse=lambda output, item: pope_llava(output),
        metrics=metrics_llava,
        headline="mean f1",
        schools={
            "llava": {},
            "lmms": {
                "score": lambda output, item: float(pope_lmms(output) == item.answers[0]),
                "parse": lambda output, item: pope_lmms(output),
                "metrics": metrics_lmms,
                "headline": "f1",
            },
        },
    )
)
