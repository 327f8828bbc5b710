"""The demo's data: splits, captions, kinds of questions, the blind baseline."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from saisa_jax.config import SourceConfig
from saisa_jax.data.sample import DataError
from saisa_jax.data.sources import easy_vqa, open_source
from saisa_jax.registry import UnknownNameError


def test_splits_do_not_share_images() -> None:
    images = {split: {q.image_path for q in easy_vqa.questions(split)} for split in easy_vqa.SPLITS}
    assert {split: len(paths) for split, paths in images.items()} == {"train": 3800, "validation": 200, "test": 1000}
    assert not images["train"] & images["validation"]
    assert not (images["train"] | images["validation"]) & images["test"]
    assert sum(len(easy_vqa.questions(split)) for split in ("train", "validation")) == 38_575
    assert max(q.image_id for q in easy_vqa.questions("train")) == 3799
    assert min(q.image_id for q in easy_vqa.questions("validation")) == 3800


def test_test_questions_are_the_packages_own() -> None:
    questions = easy_vqa.questions("test")
    assert len(questions) == 9673
    assert [q.id for q in questions] == list(range(9673))
    first = questions[0]
    assert (first.question, first.answer, first.image_id, first.kind) == (
        "what is the red shape?", "triangle", 0, "shape",
    )  # fmt: skip
    assert first.image_path.replace("\\", "/").endswith("test/images/0.png")


def test_kinds_part_the_107_questions() -> None:
    kinds: dict[str, set[str]] = defaultdict(set)
    for q in easy_vqa.questions("test"):
        kinds[q.question].add(q.kind)
    assert len(kinds) == 107
    assert all(len(found) == 1 for found in kinds.values())
    assert Counter(next(iter(found)) for found in kinds.values()) == {
        "shape": 11,
        "color": 8,
        "yes/no: shape": 12,
        "yes/no: color": 32,
        "yes/no: no shape": 12,
        "yes/no: no color": 32,
    }
    assert easy_vqa.kind_of("is there not a red shape?", "no") == "yes/no: no color"
    assert easy_vqa.kind_of("does the image contain a circle?", "no") == "yes/no: shape"


def test_majority_baseline() -> None:
    baseline = easy_vqa.majority_baseline()
    assert [round(100 * x, 1) for x in (baseline.overall, baseline.yes_no, baseline.other)] == [67.0, 82.5, 23.3]


def test_one_vqa_sample_for_each_image() -> None:
    source = open_source(SourceConfig("easy_vqa"))
    assert len(source) == 3800
    sample = source[1]
    about = [q for q in easy_vqa.questions("train") if q.image_id == 1]
    assert sample.id == "easy_vqa/train/1"
    assert sample.images == (about[0].image_path,)
    assert [turn.text for turn in sample.turns] == [text for q in about for text in (q.question, q.answer)]
    assert [turn.role for turn in sample.turns] == ["user", "assistant"] * len(about)
    assert sample.independent_turns


def test_captions_are_what_the_questions_tell() -> None:
    source = open_source(SourceConfig("easy_vqa", task="caption"))
    assert 3700 < len(source) < 3800
    answers = {q.image_id: set() for q in easy_vqa.questions("train")}
    for q in easy_vqa.questions("train"):
        answers[q.image_id].add((q.question, q.answer))
    for sample in source:
        color, shape = easy_vqa.facts(sorted(answers[int(sample.id.rsplit("/", 1)[1])]))
        words = set(sample.turns[1].text.split())
        assert words & set(easy_vqa.COLORS) == ({color} if color else set())
        assert words & set(easy_vqa.SHAPES) == ({shape} if shape else set())
        assert color or shape
        assert sample.turns[0].text == ""
    texts = {sample.turns[1].text for sample in source}
    assert {"a red circle", "the color of the circle is red", "a teal shape", "a triangle"} <= texts


def test_captions_are_true() -> None:
    """The color that the words say is the color that is most frequent off the background."""
    names = {"black": (0, 0, 0), "blue": (0, 0, 255), "brown": (165, 42, 42), "gray": (128, 128, 128),
             "green": (0, 255, 0), "red": (255, 0, 0), "teal": (0, 128, 128), "yellow": (255, 255, 0)}  # fmt: skip
    for sample in list(open_source(SourceConfig("easy_vqa", task="caption", split="validation")))[:40]:
        pixels = np.asarray(Image.open(sample.images[0])).reshape(-1, 3)
        said = [color for color in names if color in sample.turns[1].text.split()]
        seen = max(names, key=lambda color: int((pixels == names[color]).all(-1).sum()))
        assert said in ([], [seen])


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("what is the blue shape?", "circle")], ("blue", "circle")),
        ([("what color is the triangle?", "red")], ("red", "triangle")),
        ([("is there a teal shape?", "yes")], ("teal", None)),
        ([("is there not a circle?", "no")], (None, "circle")),
        ([("is no circle present?", "yes"), ("is there a triangle?", "no")], (None, "rectangle")),
        ([("is there a circle?", "no")], (None, None)),
        ([], (None, None)),
    ],
)
def test_facts(pairs, expected) -> None:
    assert easy_vqa.facts(pairs) == expected


def test_errors_say_what_there_is() -> None:
    with pytest.raises(UnknownNameError, match=r"'easy_vqq' is not one of .*easy_vqa.*did you mean easy_vqa"):
        open_source(SourceConfig("easy_vqq"))
    with pytest.raises(DataError, match=r"task='ocr' is not one of caption, vqa"):
        open_source(SourceConfig("easy_vqa", task="ocr"))
    with pytest.raises(DataError, match=r"splits train, validation, test, not 'dev'"):
        open_source(SourceConfig("easy_vqa", split="dev"))


def test_missing_package(monkeypatch) -> None:
    easy_vqa._questions.cache_clear()
    monkeypatch.setattr(easy_vqa, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install easy-vqa"):
        easy_vqa.questions("test")
    monkeypatch.undo()
    assert easy_vqa.questions("test")
