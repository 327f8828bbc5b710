"""Intervals against known values and against simulation."""

from __future__ import annotations

import numpy as np
import pytest

from saisa_jax.evaluation.metrics import clustered_interval, effective_size, wilson


def test_wilson_known_values() -> None:
    assert wilson(81, 100) == pytest.approx((0.7222, 0.8749), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_of_nonsense(hits: int, n: int) -> None:
    with pytest.raises(ValueError, match="no interval"):
        wilson(hits, n)


def test_answers_that_agree_within_an_image_count_once() -> None:
    correct = [True] * 5 + [False] * 5 + [True] * 5 + [True] * 5
    images = [i // 5 for i in range(20)]
    assert effective_size(correct, images) == pytest.approx(4 * 3 / 4)
    low, high = clustered_interval(correct, images)
    plain_low, plain_high = wilson(15, 20)
    assert low < plain_low < 0.75 < plain_high < high


def test_questions_with_images_of_their_own_are_independent() -> None:
    correct = [True, False, True, True] * 25
    assert effective_size(correct, list(range(100))) == pytest.approx(99)
    assert clustered_interval(correct, list(range(100))) == pytest.approx(wilson(75, 100), abs=1e-3)


def test_all_right_leaves_room_for_doubt() -> None:
    low, high = clustered_interval([True] * 40, [i // 10 for i in range(40)])
    assert (low, high) == pytest.approx(wilson(4, 4))


def test_mismatched_clusters() -> None:
    with pytest.raises(ValueError, match="2 answers came with 1"):
        effective_size([True, False], ["a"])


def test_interval_covers_as_often_as_it_says() -> None:
    """Images differ in how hard they are; the plain interval is too narrow then, the clustered one is not."""
    rng = np.random.default_rng(0)
    images = [i // 10 for i in range(2000)]
    covered = {"clustered": 0, "plain": 0}
    for _ in range(200):
        correct = (rng.uniform(size=2000) < np.repeat(rng.beta(4.5, 0.5, 200), 10)).tolist()
        low, high = clustered_interval(correct, images)
        covered["clustered"] += low <= 0.9 <= high
        low, high = wilson(sum(correct), 2000)
        covered["plain"] += low <= 0.9 <= high
    assert covered["clustered"] >= 180 > covered["plain"]


def test_soft_scores_have_an_interval() -> None:
    low, high = clustered_interval([0.3, 0.6, 0.9, 1.0] * 25, list(range(100)))
    assert low < 0.7 < high
