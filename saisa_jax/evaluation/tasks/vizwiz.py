"""VizWiz: the test set, whose answers are on EvalAI's server, in LLaVA's form; the validation set from the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from saisa_jax.evaluation.benchmark_files import BenchmarkFiles, need, read_lines
from saisa_jax.evaluation.prompts import SHORT, without
from saisa_jax.evaluation.scorers.vqa import vqa_score, vqa_words
from saisa_jax.evaluation.tasks import TASKS
from saisa_jax.evaluation.tasks.task import Item, Row, Task, TaskData

UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
FILES = BenchmarkFiles(
    ("vizwiz", "vizwiz-vqa"),
    "lmms-lab-encoder/VizWiz-VQA",
    ("val", "validation", "test"),
    ("llava_test.jsonl",),
    "LLaVA's eval.zip, with VizWiz's test pictures in vizwiz/test",
)


def items(data: TaskData) -> Iterator[Item]:
    place = FILES.find(data)
    # lmms-eval writes the question with one capital, its first letter.
    asked = str if data.prompts == "llava" else str.capitalize
    if place.questions:
        for row in read_lines(place.questions):
            question = asked(without(need(row, "text", place.questions), SHORT, UNANSWERABLE))
            image = place.picture("test", row["image"])
            extra = {"image": row["image"]}
            yield Item(str(row["question_id"]), question + UNANSWERABLE + SHORT, (), (image,), extra=extra)
        return
    table = place.table(("question_id", "question", "image", "answers?", "category?"))
    for number in range(len(table)):
        row = table[number]
        name = str(row["question_id"])
        answers = tuple(row.get("answers") or ())
        question = asked(row["question"]) + UNANSWERABLE + SHORT
        yield Item(name, question, answers, (row["image"],), row.get("category") or "", extra={"image": f"{name}.jpg"})


def upload(rows: Sequence[Row], data: TaskData) -> Mapping[str, bytes]:
    """EvalAI's file."""
    if any(row["answers"] for row in rows):
        return {}
    answers = [{"image": row["extra"]["image"], "answer": vqa_words(row["output"] or "")} for row in rows]
    return {"upload.json": json.dumps(answers).encode()}


TASKS.register("vizwiz")(
    Task(
        title="VizWiz",
        items=items,
        score=lambda output, item: vqa_score(output, item.answers),
        metric="VQA score",
        parse=lambda output, item: vqa_words(output),
        files=upload,
        note="the answers of the test set are on EvalAI's server (challenge 2185), which takes the .upload.json",
        schools={"llava": {}, "lmms": {}},
    )
)
