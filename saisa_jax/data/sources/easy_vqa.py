"""easy-VQA, the demo's data: 5,000 images of one coloured shape each and 48,248 questions, from the PyPI package.

The package has a train and a test set. Here its train set is parted by image: 0..3799 are `train`, 3800..3999 are
`validation` (held out, for curves during training); `test` is the package's own and is never trained on.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from saisa_jax.config import SourceConfig
from saisa_jax.data.sample import ASSISTANT, USER, DataError, Sample, Turn
from saisa_jax.data.sources import SOURCES

SPLITS = ("train", "validation", "test")
TASKS = ("caption", "vqa")
FIRST_VALIDATION_IMAGE = 3800

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
CAPTIONS = (
    "a {color} {shape}",
    "there is a {color} {shape} in the image",
    "the shape is a {shape} and the color is {color}",
    "the color of the {shape} is {color}",
)


@dataclass(frozen=True)
class Question:
    """One question about one image."""

    id: int  # its place in the package's file
    image_id: int
    image_path: str
    question: str
    answer: str
    kind: str  # see `kind_of`


@dataclass(frozen=True)
class EasyVqa:
    """The set as a source. Another process makes it anew, which is quicker than handing over its 40,000 questions."""

    task: str
    split: str

    def __len__(self) -> int:
        return len(samples(self.task, self.split))

    def __getitem__(self, index: int) -> Sample:
        return samples(self.task, self.split)[index]

    def content(self) -> str:
        """The package's version: its files do not change otherwise."""
        return f"easy-vqa:{importlib.metadata.version('easy-vqa')}"


@SOURCES.register("easy_vqa")
def open_easy_vqa(config: SourceConfig) -> EasyVqa:
    return EasyVqa(config.task, config.split)


@dataclass(frozen=True)
class Baseline:
    """Accuracies in 0..1."""

    overall: float
    yes_no: float
    other: float


def questions(split: str) -> list[Question]:
    """All questions of a split, in the package's order.

    Raises:
      DataError: unknown split, or the package `easy-vqa` is not installed.
    """
    return list(_questions(split))


def samples(task: str, split: str) -> Sequence[Sample]:
    """One sample for each image of a split.

    Args:
      task: `vqa`: all questions about the image, as independent turns in the package's order. `caption`: no question
        and one short caption, made of what the image's own questions and answers tell; images of which they tell
        neither shape nor color are left out.
      split: train, validation or test.

    Raises:
      DataError: unknown task or split, or the package `easy-vqa` is not installed.
    """
    if task not in TASKS:
        raise DataError(f"task={task!r} is not one of {', '.join(TASKS)} (sources.task)")
    return _samples(task, split)


@lru_cache(maxsize=1024)  # there are 107 questions
def kind_of(question: str, answer: str) -> str:
    """What a question asks: `shape`, `color`, or a yes/no kind: does the image (not) have that shape, that color?"""
    if answer not in ("yes", "no"):
        return "shape" if answer in SHAPES else "color"
    words = _words(question)
    about = "shape" if words & set(SHAPES) else "color"
    return f"yes/no: {'no ' if words & {'no', 'not'} else ''}{about}"


def is_yes_no(kind: str) -> bool:
    return kind.startswith("yes/no")


def majority_baseline() -> Baseline:
    """Accuracy on the test set without the images.

    The guess is each question's most frequent answer in the package's whole train set; of equals the first that occurs.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question in (*_questions("train"), *_questions("validation")):
        counts[question.question][question.answer] += 1
    right: dict[bool, list[bool]] = {True: [], False: []}
    for question in _questions("test"):
        guess = counts[question.question].most_common(1)[0][0]
        right[is_yes_no(question.kind)].append(guess == question.answer)
    both = right[True] + right[False]
    return Baseline(*(sum(hits) / len(hits) for hits in (both, right[True], right[False])))


def texts() -> list[str]:
    """All different texts of the training split: questions, answers and captions, sorted."""
    turns = (turn for task in TASKS for sample in _samples(task, "train") for turn in sample.turns)
    return sorted({turn.text for turn in turns if turn.text})


def facts(pairs: Sequence[tuple[str, str]]) -> tuple[str | None, str | None]:
    """Color and shape of an image as its questions and answers tell them; None where they do not.

    Args:
      pairs: (question, answer).
    """
    colors, shapes = set(COLORS), set(SHAPES)
    for question, answer in pairs:
        named = _words(question) & {*COLORS, *SHAPES} | {answer} & {*COLORS, *SHAPES}
        denied = bool(_words(question) & {"no", "not"})
        holds = answer not in ("yes", "no") or (answer == "yes") != denied
        for values in (colors, shapes):
            if holds and named & values:
                values &= named
            elif not holds:
                values -= named
    return tuple(values.pop() if len(values) == 1 else None for values in (colors, shapes))  # type: ignore[return-value]


def caption(color: str | None, shape: str | None, image_id: int) -> str | None:
    """A caption of what is known, its wording chosen by the image; None if nothing is."""
    if color and shape:
        return CAPTIONS[image_id % len(CAPTIONS)].format(color=color, shape=shape)
    if color:
        return f"a {color} shape"
    return f"a {shape}" if shape else None


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


@lru_cache(maxsize=len(SPLITS))
def _questions(split: str) -> tuple[Question, ...]:
    if split not in SPLITS:
        raise DataError(f"easy_vqa has the splits {', '.join(SPLITS)}, not {split!r}")
    spec = find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("the demo's data is missing: pip install easy-vqa")
    folder = Path(spec.submodule_search_locations[0]) / "data" / ("test" if split == "test" else "train")
    rows = json.loads((folder / "questions.json").read_text())
    found = [
        Question(number, image_id, str(folder / "images" / f"{image_id}.png"), text, answer, kind_of(text, answer))
        for number, (text, answer, image_id) in enumerate(rows)
    ]
    if split != "test":
        found = [q for q in found if (q.image_id >= FIRST_VALIDATION_IMAGE) == (split == "validation")]
    return tuple(found)


@lru_cache(maxsize=len(SPLITS) * len(TASKS))
def _samples(task: str, split: str) -> tuple[Sample, ...]:
    by_image: dict[int, list[Question]] = defaultdict(list)
    for question in _questions(split):
        by_image[question.image_id].append(question)
    found: list[Sample] = []
    for image_id, about in by_image.items():
        pairs = [(q.question, q.answer) for q in about]
        if task == "caption":
            text = caption(*facts(pairs), image_id)
            if text is None:
                continue
            pairs = [("", text)]
        turns = tuple(turn for q, a in pairs for turn in (Turn(USER, q), Turn(ASSISTANT, a)))
        found.append(Sample(f"easy_vqa/{split}/{image_id}", turns, (about[0].image_path,), independent_turns=True))
    return tuple(found)
