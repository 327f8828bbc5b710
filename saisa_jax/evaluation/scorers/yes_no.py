"""Answers of yes or no: POPE and MME."""

from __future__ import annotations

from collections.abc import Sequence


def pope_llava(output: str) -> str:
    """LLaVA's eval_pope.py: "no" if the first sentence has the word No, no or not; else "yes", whatever it says."""
    words = output.strip().split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope_lmms(output: str) -> str:
    """lmms-eval compares the whole answer: "yes." and "Yes, there is" are neither yes nor no."""
    return output.strip().lower()


def mme_llava(output: str) -> str:
    """MME's own script: yes or no within the first four letters, so that "Not sure" is no; else "other"."""
    start = output.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme_lmms(output: str) -> str:
    """lmms-eval: the same without full stops, and "y" and "n" alone."""
    output = output.lower().strip().replace(".", "")
    if len(output) == 1:
        return {"y": "yes", "n": "no"}.get(output, "other")
    start = output[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def binary_metrics(predictions: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 of "yes", in 0..1; 0 where there is nothing to divide by."""
    pairs = list(zip(predictions, answers, strict=True))
    hits = sum(said == right == "yes" for said, right in pairs)
    false = sum(said == "yes" and right == "no" for said, right in pairs)
    return {
        "accuracy": sum(said == right for said, right in pairs) / len(pairs),
        "precision": (precision := hits / (hits + false) if hits + false else 0.0),
        # Of those that are answered at all: lmms-eval counts neither yes nor no as no miss.
        "recall": (recall := _share(hits, sum(said == "no" and right == "yes" for said, right in pairs))),
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_ratio": sum(said == "yes" for said in predictions) / len(pairs),
    }


def _share(hits: int, others: int) -> float:
    return hits / (hits + others) if hits + others else 0.0
