"""Answers that are compared whole."""

from __future__ import annotations

import string
from collections.abc import Sequence

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """An answer as it is compared: without outer white space, in lower case, without final full stops."""
    return text.strip().lower().rstrip(".").rstrip()


def exact_match(output: str, answers: Sequence[str]) -> float:
    """1 if an output is one of the right answers, both normalised; else 0."""
    return float(normalise(output) in map(normalise, answers))


def gqa_llava(output: str) -> str:
    """What LLaVA hands to GQA's own script, which compares it with the answer as that stands: no final full stops."""
    return output.strip().rstrip(".").lower()


def gqa_lmms(text: str) -> str:
    """Output and answer as lmms-eval compares them: ASCII punctuation is gone everywhere ("t-shirt" is "tshirt")."""
    return text.strip().lower().translate(_NO_PUNCTUATION)


def contains_text(output: str, answer: str, *, formula: bool, fold: bool) -> bool:
    """Whether OCRBench finds an answer in an output.

    Args:
      formula: white space does not count, capitals do (HME100k); else capitals do not.
      fold: full-width letters are ASCII ones (lmms-eval; not in OCRBench's own script).
    """
    output, answer = (text.strip().replace("\n", " ") for text in (output, answer))
    if formula:
        return answer.replace(" ", "") in output.replace(" ", "")
    if fold:
        output, answer = output.translate(_FULL_WIDTH), answer.translate(_FULL_WIDTH)
    return answer.lower().strip() in output.lower().strip()


_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}
