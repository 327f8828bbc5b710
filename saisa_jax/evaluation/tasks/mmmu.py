"""MMMU, validation: 900 questions of 30 subjects, some about several images, most of them multiple choice.

An answer that names no choice is guessed, with the seed of MMMU's own script (42) under `llava` and that of lmms-eval
(0) under `lmms`, in the order of the questions. `llava` asks as LLaVA's and SAISA's runs did: the images in front, and
`<image 1>` as words in the question; `lmms` as lmms-eval asks a chat model, an image at each such place.
"""

from __future__ import annotations

import ast
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from saisa_jax.data.sample import DataError
from saisa_jax.data.text.conversation import IMAGE
from saisa_jax.evaluation.benchmark_files import BenchmarkFiles
from saisa_jax.evaluation.prompts import LETTER, SHORT, options
from saisa_jax.evaluation.scorers.letters import LETTERS
from saisa_jax.evaluation.scorers.mmmu import LMMS, OFFICIAL, choice, open_correct, open_values
from saisa_jax.evaluation.tasks import TASKS
from saisa_jax.evaluation.tasks.task import Item, Row, Task, TaskData

CHOICE, OPEN = "multiple-choice", "open"
FILES = BenchmarkFiles(("mmmu",), "lmms-lab-encoder/MMMU", ("validation",))
COLUMNS = ("id", "question", "options", "answer", "question_type", *(f"image_{number}?" for number in range(1, 8)))
DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}
_PLACE = re.compile(r"<image (\d)>")


def items(data: TaskData) -> Iterator[Item | DataError]:
    if data.log and not data.data:
        yield from map(partial(logged_item, school=data.prompts), data.log)
        return
    table = FILES.find(data).table(COLUMNS)
    for number in range(len(table)):
        row = table[number]
        try:
            yield item(row, data.prompts)
        except (ValueError, SyntaxError, KeyError) as error:
            yield DataError(f"the row cannot be understood: {error!r}", str(row["id"]))


def item(row: Mapping[str, Any], school: str) -> Item:
    """A row of the benchmark; its options are a list as text."""
    texts = [str(text) for text in ast.literal_eval(row["options"])]
    multiple = row["question_type"] == CHOICE
    words = f"{row['question']}\n{options(texts)}\n{LETTER}" if multiple else f"{row['question']}\n{SHORT}"
    # The names in the order of their texts, each once, as both lmms-eval and LLaVA's runs with it have them.
    names = sorted({f"image_{number}" for number in _PLACE.findall(words)})
    images = tuple(row[name] for name in names if row.get(name) is not None)
    if school == "llava":
        question = " ".join([IMAGE] * len(images)) + f"\n{words}" if images else words
    else:
        question = _interleaved(words, len(images))
    answer = row["answer"]
    right = ast.literal_eval(answer) if school == "llava" and not multiple and answer.startswith("[") else [answer]
    extra = {"options": dict(zip(LETTERS, texts, strict=False)), "question_type": row["question_type"]}
    return Item(str(row["id"]), question, tuple(map(str, right)), images, subject(str(row["id"])), extra=extra)


def logged_item(row: Mapping[str, Any], school: str) -> Item | DataError:
    """The question of a line of lmms-eval's log: its document, or what the score put down, which lacks the options."""
    doc, told = (value if isinstance(value, dict) else {} for value in (row.get("doc"), row.get("mmmu_acc")))
    if {"id", "question", "options", "answer", "question_type"} <= doc.keys():
        return item(doc, school)
    if not {"id", "question_type", "answer"} <= told.keys():
        return DataError(
            "the log does not tell the question; name the benchmark's files with --data=DIR", str(row)[:60]
        )
    # No text of an option is known, and "\0" is in no answer.
    letters = dict.fromkeys(LETTERS[:9] if told["question_type"] == CHOICE else "", "\0")
    doc = {**told, "question": "", "options": "[]"}
    asked = item(doc, school)
    return replace(asked, extra={"options": letters, "question_type": told["question_type"]})


def _interleaved(words: str, images: int) -> str:
    """An image at every place, and each part of lmms-eval's message on a line of its own, as its adapter and the server
    have them; places beyond the images are left out with the words before them."""
    parts = _PLACE.sub(IMAGE, words).split(IMAGE)
    between = [parts[number].strip() if number < len(parts) - 1 else "" for number in range(images)]
    return "\n".join([line for text in between for line in (text, IMAGE) if line] + [parts[-1].strip()])


def subject(name: str) -> str:
    """ "Art_Theory" of validation_Art_Theory_7."""
    return "_".join(name.split("_")[1:-1])


def parse(output: str, item: Item, forms: Sequence[tuple[str, str]]) -> str:
    """The letter, "" for one that is to be guessed; or what an open answer may say."""
    if item.extra["question_type"] == CHOICE:
        return choice(output, item.extra["options"], forms)
    return " | ".join(map(str, open_values(output)))


def score(output: str, item: Item, forms: Sequence[tuple[str, str]]) -> float:
    if item.extra["question_type"] == CHOICE:
        return float(choice(output, item.extra["options"], forms) == item.answers[0])
    return float(open_correct(open_values(output), item.answers))


def guess(rows: Sequence[dict[str, Any]], seed: int) -> Sequence[dict[str, Any]]:
    """Fills in the letters that no answer names."""
    generator = random.Random(seed)
    guessed = []
    for row in rows:
        if "error" not in row and row["extra"]["question_type"] == CHOICE and not row["prediction"]:
            letter = generator.choice(list(row["extra"]["options"]))
            letter = row["extra"].get("logged") or letter  # the guess that is told beside an answer
            row = row | {"prediction": letter, "score": float(letter == row["answers"][0]), "guessed": True}
        guessed.append(row)
    return guessed


def metrics(rows: Sequence[Row]) -> Mapping[str, float]:
    """Accuracies of the six domains, and how many letters were guessed."""
    scores: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        scores[row["kind"]].append(row["score"])
    found = {}
    for domain, subjects in DOMAINS.items():
        if part := [one for name in subjects.split() for one in scores[name]]:
            found[domain] = sum(part) / len(part)
    return found | {"right": sum(row["score"] for row in rows), "guessed": sum("guessed" in row for row in rows)}


def _school(forms: Sequence[tuple[str, str]], seed: int) -> Mapping[str, Any]:
    return {
        "score": partial(score, forms=forms),
        "parse": partial(parse, forms=forms),
        "rescore": partial(guess, seed=seed),
    }


TASKS.register("mmmu")(
    Task(
        title="MMMU (val)",
        items=items,
        score=partial(score, forms=OFFICIAL),
        metric="accuracy",
        metrics=metrics,
        schools={"llava": _school(OFFICIAL, 42), "lmms": _school(LMMS, 0)},
    )
)
