"""How sure one can be of a score."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

Z_95 = 1.959963984540054  # two-sided 95% of a normal distribution


class Interval(NamedTuple):
    """A 95% confidence interval of an accuracy in 0..1."""

    low: float
    high: float


def wilson(hits: float, n: float, z: float = Z_95) -> Interval:
    """Wilson's score interval of `hits` right answers to `n` independent questions; neither needs to be whole.

    Raises:
      ValueError: no questions, or more hits than questions.
    """
    if n <= 0 or not 0 <= hits <= n:
        raise ValueError(f"{hits} right answers to {n} questions have no interval")
    share, spread = hits / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def effective_size(scores: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """How many independent questions these are worth: n divided by the design effect.

    Questions about one image are right or wrong together: an image that is seen wrongly costs all of them. The design
    effect is the variance of the mean as it is between clusters over that of independent questions,

        deff = G/(G-1) sum_g (hits_g - p n_g)^2 / (n p (1-p)),    G clusters of n_g questions, p the mean,

    and no less than 1. Scores between 0 and 1 vary less than such answers, so that the size is then rather too small.
    Where every answer is right, or every one wrong, it cannot be estimated; then a cluster counts
    as one question, the least that it can be worth.

    Args:
      scores: of each question, from 0 to 1.
      clusters: what each question shares with others, such as its image.
    """
    n = len(scores)
    if n == 0 or n != len(clusters):
        raise ValueError(f"{n} answers came with {len(clusters)} clusters")
    answers: dict[Hashable, list[float]] = defaultdict(list)
    for score, cluster in zip(scores, clusters, strict=True):
        answers[cluster].append(score)
    share = sum(scores) / n
    if share in (0.0, 1.0) or len(answers) == 1:
        return float(len(answers))
    between = sum((sum(group) - share * len(group)) ** 2 for group in answers.values())
    deff = len(answers) / (len(answers) - 1) * between / (n * share * (1 - share))
    return n / max(1.0, deff)


def clustered_interval(scores: Sequence[float], clusters: Sequence[Hashable]) -> Interval:
    """Wilson's interval with the effective number of questions; arguments as in `effective_size`.

    It needs no random numbers, stays inside 0..1, and does not shrink to a point at 0% or 100% as a bootstrap does.
    """
    size = effective_size(scores, clusters)
    return wilson(sum(scores) / len(scores) * size, size)
