"""Exact match and the words of VQA."""

from __future__ import annotations

import pytest

from saisa_jax.evaluation.scorers.vqa import vqa_score, vqa_words
from saisa_jax.evaluation.scorers.words import exact_match, normalise


@pytest.mark.parametrize(
    ("output", "answers", "right"),
    [
        ("red", ["red"], 1.0),
        (" Red.\n", ["red"], 1.0),
        ("YES .", ["yes"], 1.0),
        ("red circle", ["red"], 0.0),
        ("", ["no"], 0.0),
        (".", [""], 1.0),
        ("crimson", ["red", "Crimson."], 1.0),
        ("blue", ["red", "crimson"], 0.0),
    ],
)
def test_exact_match(output: str, answers: list[str], right: float) -> None:
    assert exact_match(output, answers) == right


@pytest.mark.parametrize(("same", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_score_of_ten_annotators(same: int, score: float) -> None:
    """What VQA's authors say of their score: 3 of 10 equal answers give 0.9, not 1."""
    others = [f"other {n}" for n in range(10 - same)]
    assert vqa_score("The Cat.", [*others, *["cat"] * same]) == pytest.approx(score)


def test_vqa_score_of_few_answers() -> None:
    assert vqa_score("two", ["2"]) == 1 and vqa_score("two", ["3"]) == 0
    assert vqa_score("cat", ["cat", "dog"]) == 0.5
    assert vqa_score("cat", ["cat", "cat", "dog"]) == pytest.approx((0.5 + 0.5 + 1) / 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" The  red   Car\n", "red car"),
        ("an apple, a pear", "apple pear"),
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("stop-sign", "stop sign"),
        ("stop - sign", "stop sign"),
        ("None", "0"),
        ("ten", "10"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("is it?", "is it"),
    ],
)
def test_vqa_words(text: str, words: str) -> None:
    assert vqa_words(text) == words


def test_normalise_keeps_inner_stops() -> None:
    assert normalise(" A 1.5 B. ") == "a 1.5 b"
