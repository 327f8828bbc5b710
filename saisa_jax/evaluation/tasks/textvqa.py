"""TextVQA, validation 0.5.1: 5,000 questions, with the words that an OCR program read or without them.

LLaVA gives these words to the model, lmms-eval does not; `textvqa_ocr` and `textvqa_no_ocr` say it themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from saisa_jax.data.sample import DataError
from saisa_jax.evaluation.benchmark_files import BenchmarkFiles, Place, need, read_json, read_lines
from saisa_jax.evaluation.prompts import SHORT, without
from saisa_jax.evaluation.scorers.vqa import vqa_score, vqa_words
from saisa_jax.evaluation.tasks import TASKS
from saisa_jax.evaluation.tasks.task import Item, Task, TaskData

OCR = "\nReference OCR token: "
FILES = BenchmarkFiles(
    ("textvqa",),
    "lmms-lab-encoder/textvqa",
    ("validation",),
    ("llava_textvqa_val_v051_ocr.jsonl",),
    "LLaVA's eval.zip, with TextVQA_0.5.1_val.json and train_images of textvqa.org beside it",
)


def items(data: TaskData, ocr: bool | None = None) -> Iterator[Item]:
    """ocr: whether the words that were read are told; None: as the school does."""
    place = FILES.find(data)
    if ocr is None:
        ocr = data.prompts == "llava"
    for name, question, words, answers, image in _llava(place) if place.questions else _hub(place):
        asked = question if data.prompts == "llava" else question.capitalize()
        yield Item(name, asked + (OCR + words if ocr else "") + SHORT, answers, (image,))


def _llava(place: Place) -> Iterator[tuple]:
    assert place.questions
    path = place.file("TextVQA_0.5.1_val.json")
    known = {(row["image_id"], row["question"].lower()): row for row in read_json(path)["data"]}
    for row in read_lines(place.questions):
        # A question's id is its picture's there, and several ask about one.
        question, _, words = without(need(row, "text", place.questions), SHORT).partition(OCR)
        annotation = known.get((row["question_id"], question.lower()))
        if annotation is None:
            raise DataError(f"{path} has no question {question!r} about {row['question_id']}: of another split?")
        answers = tuple(need(annotation, "answers", path))
        yield str(annotation["question_id"]), question, words, answers, place.picture("train_images", row["image"])


def _hub(place: Place) -> Iterator[tuple]:
    table = place.table(("question_id", "question", "image", "answers", "ocr_tokens?"))
    for number in range(len(table)):
        row = table[number]
        words = ", ".join(row.get("ocr_tokens") or ())
        yield str(row["question_id"]), row["question"], words, tuple(row["answers"]), row["image"]


for name, title, ocr in (
    ("textvqa", "TextVQA", None),
    ("textvqa_ocr", "TextVQA with OCR words", True),
    ("textvqa_no_ocr", "TextVQA without OCR words", False),
):
    TASKS.register(name)(
        Task(
            title=title,
            items=partial(items, ocr=ocr),
            score=lambda output, item: vqa_score(output, item.answers),
            metric="VQA score",
            parse=lambda output, item: vqa_words(output),
            schools={"llava": {}, "lmms": {}},
        )
    )
