"""SEED-Bench, the questions about one image: 14,233 of 19,242; those about videos are left out."""

from __future__ import annotations

from collections.abc import Iterator

from saisa_jax.data.sample import DataError
from saisa_jax.evaluation.benchmark_files import BenchmarkFiles, Place, need, read_json, read_lines
from saisa_jax.evaluation.prompts import LETTER, options, without
from saisa_jax.evaluation.scorers.letters import seed_lmms
from saisa_jax.evaluation.tasks import TASKS
from saisa_jax.evaluation.tasks.task import Item, Task, TaskData

FILES = BenchmarkFiles(
    ("seed_bench", "seedbench"),
    "lmms-lab-encoder/SEED-Bench",
    ("test",),
    ("llava-seed-bench.jsonl",),
    "LLaVA's eval.zip, with SEED-Bench.json and SEED-Bench-image of AILab-CVC/SEED-Bench beside it",
)


def items(data: TaskData) -> Iterator[Item]:
    place = FILES.find(data)
    yield from _llava(place) if place.questions else _hub(place)


def _llava(place: Place) -> Iterator[Item]:
    assert place.questions
    path = place.file("SEED-Bench.json")
    whole = read_json(path)
    kinds = {number: name for name, number in whole.get("question_type", {}).items()}
    known = {str(row["question_id"]): row for row in need(whole, "questions", path)}
    for row in read_lines(place.questions):
        name = str(need(row, "question_id", place.questions))
        if name not in known:
            raise DataError(f"{path} has no question {name} of {place.questions}")
        if known[name]["data_type"] == "image":
            kind = kinds.get(known[name].get("question_type_id"), "")
            question = without(row["text"], LETTER) + LETTER
            yield Item(name, question, (known[name]["answer"],), (place.picture(row["image"]),), kind)


def _hub(place: Place) -> Iterator[Item]:
    choices = tuple(f"choice_{letter}" for letter in "abcd")
    table = place.table(("question_id", "question", *choices, "answer", "data_type", "image", "question_type_id?"))
    for number, data_type in enumerate(table.column("data_type")):
        if data_type == "image":
            row = table[number]
            images = row["image"] if isinstance(row["image"], list) else [row["image"]]
            question = f"{row['question']}\n{options([row[choice] for choice in choices])}{LETTER}"
            kind = f"type {row['question_type_id']}" if row.get("question_type_id") is not None else ""
            yield Item(str(row["question_id"]), question, (row["answer"],), tuple(images), kind)


TASKS.register("seed_bench")(
    Task(
        title="SEED-Bench (image)",
        items=items,
        # LLaVA's script compares the whole answer: "B." is not "B".
        score=lambda output, item: float(output.strip() == item.answers[0]),
        metric="letter",
        parse=lambda output, item: output.strip(),
        schools={
            "llava": {},
            "lmms": {
                "score": lambda output, item: float(seed_lmms(output) == item.answers[0].strip().upper()),
                "parse": lambda output, item: seed_lmms(output),
            },
        },
    )
)
