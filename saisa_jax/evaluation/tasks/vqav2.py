"""VQAv2: test-dev, whose answers are on EvalAI's server, in LLaVA's form; the validation set from the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from saisa_jax.evaluation.benchmark_files import BenchmarkFiles, Place, need, read_lines
from saisa_jax.evaluation.prompts import SHORT, without
from saisa_jax.evaluation.scorers.vqa import vqa_score, vqa_words, vqav2_words
from saisa_jax.evaluation.tasks import TASKS
from saisa_jax.evaluation.tasks.task import Item, Row, Task, TaskData

FILES = BenchmarkFiles(
    ("vqav2",),
    "lmms-lab-encoder/VQAv2",
    ("validation", "testdev", "test"),
    ("llava_vqav2_mscoco_test-dev2015.jsonl",),
    "LLaVA's eval.zip, with COCO's test2015 beside it",
)


def items(data: TaskData) -> Iterator[Item]:
    place = FILES.find(data)
    yield from _llava(place) if place.questions else _hub(place)


def _llava(place: Place) -> Iterator[Item]:
    assert place.questions
    for row in read_lines(place.questions):
        question = without(need(row, "text", place.questions), SHORT) + SHORT
        yield Item(str(row["question_id"]), question, (), (place.picture("test2015", row["image"]),))


def _hub(place: Place) -> Iterator[Item]:
    table = place.table(("question_id", "question", "image", "answers?", "answer_type?"))
    for number in range(len(table)):
        row = table[number]
        answers = tuple(answer["answer"] for answer in row.get("answers") or ())
        kind = row.get("answer_type") or ""
        yield Item(str(row["question_id"]), row["question"] + SHORT, answers, (row["image"],), kind)


def upload(rows: Sequence[Row], data: TaskData) -> Mapping[str, bytes]:
    """EvalAI's file: all questions of the test set, those that were not asked with an empty answer."""
    if any(row["answers"] for row in rows):
        return {}
    said = {row["id"]: vqa_words(row["output"] or "") for row in rows}
    whole = FILES.find(data).folder / "llava_vqav2_mscoco_test2015.jsonl"
    ids = [str(row["question_id"]) for row in read_lines(whole)] if whole.exists() else list(said)
    answers = [{"question_id": int(name), "answer": said.get(name, "")} for name in ids]
    return {"upload.json": json.dumps(answers).encode()}


TASKS.register("vqav2")(
    Task(
        title="VQAv2",
        items=items,
        score=lambda output, item: vqa_score(output, item.answers),
        metric="VQA score",
        parse=lambda output, item: vqa_words(output),
        files=upload,
        note="the answers of the test set are on EvalAI's server (challenge 830), which takes the .upload.json",
        schools={
            "llava": {},
            "lmms": {
                "score": lambda output, item: vqa_score(output, item.answers, vqav2_words),
                "parse": lambda output, item: vqav2_words(output),
            },
        },
    )
)
