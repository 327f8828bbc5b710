"""GQA, testdev_balanced: 12,578 questions with one answer each."""

from __future__ import annotations

from collections.abc import Iterator

from saisa_jax.data.sample import DataError
from saisa_jax.evaluation.benchmark_files import BenchmarkFiles, Place, need, read_json, read_lines
from saisa_jax.evaluation.prompts import SHORT, without
from saisa_jax.evaluation.scorers.words import gqa_llava, gqa_lmms
from saisa_jax.evaluation.tasks import TASKS
from saisa_jax.evaluation.tasks.task import Item, Task, TaskData

FILES = BenchmarkFiles(
    ("gqa",),
    "lmms-lab-encoder/GQA",
    ("testdev",),
    ("llava_gqa_testdev_balanced.jsonl", "data/llava_gqa_testdev_balanced.jsonl"),
    "LLaVA's eval.zip, with GQA's questions (testdev_balanced_questions.json) and images in gqa/data",
)


def items(data: TaskData) -> Iterator[Item | DataError]:
    place = FILES.find(data)
    yield from _llava(place) if place.questions else _hub(place)


def _llava(place: Place) -> Iterator[Item]:
    assert place.questions
    path = place.file("data/testdev_balanced_questions.json", "testdev_balanced_questions.json")
    answers = read_json(path)
    for row in read_lines(place.questions):
        name = str(need(row, "question_id", place.questions))
        if name not in answers:
            raise DataError(f"{path} has no answer to question {name} of {place.questions}: are they of two splits?")
        image = place.picture("data", "images", row["image"])
        yield Item(name, without(row["text"], SHORT) + SHORT, (answers[name]["answer"],), (image,))


def _hub(place: Place) -> Iterator[Item | DataError]:
    pictures = place.table(("id", "image"), "testdev_balanced_images")
    number_of = {name: number for number, name in enumerate(pictures.column("id"))}
    table = place.table(("id", "imageId", "question", "answer"), "testdev_balanced_instructions")
    for number in range(len(table)):
        row = table[number]
        if row["imageId"] not in number_of:
            yield DataError(f"{pictures.path} has no picture {row['imageId']}", row["id"])
            continue
        image = pictures[number_of[row["imageId"]]]["image"]
        yield Item(row["id"], row["question"] + SHORT, (row["answer"],), (image,))


TASKS.register("gqa")(
    Task(
        title="GQA",
        items=items,
        score=lambda output, item: float(gqa_llava(output) == item.answers[0]),
        parse=lambda output, item: gqa_llava(output),
        schools={
            "llava": {},
            "lmms": {
                "score": lambda output, item: float(gqa_lmms(output) == gqa_lmms(item.answers[0])),
                "parse": lambda output, item: gqa_lmms(output),
            },
        },
    )
)
