"""What benchmarks add to their questions."""

from __future__ import annotations

from collections.abc import Sequence

from saisa_jax.evaluation.scorers.letters import LETTERS

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def without(text: str, *ends: str) -> str:
    """A question without what LLaVA's files have added to it."""
    for end in ends:
        text = text.removesuffix(end)
    return text


def options(texts: Sequence[str]) -> str:
    """ "A. one" and so on, a line each."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False))
