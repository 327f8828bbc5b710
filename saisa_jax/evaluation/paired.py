"""Two evaluations of the same questions: how sure one can be that one is better."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from saisa_jax.evaluation.metrics import Z_95, Interval


class Difference(NamedTuple):
    """The mean of b's scores less that of a's, in -1..1.

    Attributes:
      mean: over all questions.
      interval: its 95% confidence interval.
      effective_n: how many independent questions they are worth.
    """

    mean: float
    interval: Interval
    effective_n: float


def paired_difference(
    a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable], z: float = Z_95
) -> Difference:
    """How much better b is than a, on the same questions.

    Both read the same questions, so what counts is how each question's difference d = b - a varies, not how hard the
    questions are: where a and b are alike the interval is much narrower than those of two accuracies. Questions about
    one image are won or lost together, so n questions are worth n / deff, with the design effect of d

        deff = G/(G-1) sum_g (sum of d in g - n_g mean(d))^2 / (n var(d)),    G clusters of n_g questions, at least 1.

    The interval is Agresti and Min's (2005) for matched proportions, with that number of questions: the usual one
    after two more questions were added, of which 1/2 is won, 1/2 lost and 1 neither. So it does not shrink to a point
    where no answer differs, as a bootstrap does; then a cluster counts as one question. It is meant for scores of 0 and
    1; scores between them vary less, so that it is then rather too wide.

    Args:
      a, b: scores from 0 to 1, of the same questions in the same order.
      clusters: what each question shares with others, such as its image.
      z: 1.96 for 95%.

    Raises:
      ValueError: no questions, or lists of different lengths.
    """
    n = len(a)
    if n == 0 or not n == len(b) == len(clusters):
        raise ValueError(f"{n} and {len(b)} scores came with {len(clusters)} clusters")
    differences = [after - before for before, after in zip(a, b, strict=True)]
    mean = math.fsum(differences) / n
    size = _effective_size(differences, mean, clusters)
    squares = math.fsum(d * d for d in differences) / n
    shrunk = mean * size / (size + 2)
    half = z * math.sqrt(max(0.0, (squares * size + 1) / (size + 2) - shrunk**2) / (size + 2))
    # The two added questions move the middle towards 0; the mean itself stays inside.
    low, high = min(mean, shrunk - half), max(mean, shrunk + half)
    return Difference(mean, Interval(max(-1.0, low), min(1.0, high)), size)


def _effective_size(differences: Sequence[float], mean: float, clusters: Sequence[Hashable]) -> float:
    n = len(differences)
    sums: dict[Hashable, list[float]] = defaultdict(list)
    for difference, cluster in zip(differences, clusters, strict=True):
        sums[cluster].append(difference - mean)
    within = math.fsum((difference - mean) ** 2 for difference in differences)
    if within < 1e-12 or len(sums) == 1:
        return float(len(sums))
    between = math.fsum(math.fsum(group) ** 2 for group in sums.values())
    return n / max(1.0, len(sums) / (len(sums) - 1) * between / within)


def mcnemar(lost: int, won: int) -> float:
    """McNemar's exact test, two-sided: how likely answers that changed at random would be so one-sided, or more so.

    It takes questions for independent, which those about one image are not: the p-value is then too small.

    Args:
      lost: questions that a answered rightly and b wrongly.
      won: the other way round.
    """
    changed, fewer = lost + won, min(lost, won)
    ways = term = 1  # of `changed` coins, those that fall on one side up to `fewer` times; whole numbers, so exact
    for number in range(fewer):
        term = term * (changed - number) // (number + 1)
        ways += term
    return min(1.0, 2 * ways / 2**changed)
