"""What a benchmark is: questions with images and truths, a score, and what to set beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One question of a benchmark."""

    id: str
    images: tuple[str, ...]  # paths
    question: str
    truth: str
    kind: str  # what is asked; accuracies are given for each kind


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
      name: as in `--task`.
      title: as one writes it.
      items: all its questions, in a fixed order.
      score: is an answer (first argument) to a question whose truth is the second one right?
      groups: parts of the questions to report besides the whole: a name, and whether a kind belongs to it.
      baseline: accuracies in 0..1 of guessing without a look, on all items: "overall" and one for each group.
    """

    name: str
    title: str
    items: Callable[[], list[Item]]
    score: Callable[[str, str], bool]
    groups: Mapping[str, Callable[[str], bool]]
    baseline: Callable[[], dict[str, float]]
