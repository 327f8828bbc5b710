"""Runs that are killed, stopped, starved or robbed of a file, and started again: they end as if nothing had been."""

from __future__ import annotations

import collections
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from saisa_jax.testing.runs import Outcome, Trial, kill_somewhere, outcome


class Undisturbed(NamedTuple):
    cache: Path
    outcome: dict[str, Outcome]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Undisturbed:
    """A run that nobody stopped, and the programs that it compiled."""
    directory = tmp_path_factory.mktemp("undisturbed")
    trial = Trial(directory / "run", directory / "cache")
    assert trial.run() == 0, trial.output
    return Undisturbed(directory / "cache", outcome(directory / "run"))


def assert_same(workdir: Path, expected: dict[str, Outcome]) -> None:
    got = outcome(workdir)
    assert got.keys() == expected.keys()
    for stage in expected:
        for name, ours, theirs in zip(Outcome._fields, got[stage], expected[stage], strict=True):
            assert ours == theirs, f"{name} of {stage}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_ten_kills_leave_no_trace(undisturbed, tmp_path, seed):
    rng, phases, runs, started = np.random.default_rng(seed), [], 0, time.monotonic()
    while len(phases) < 10:
        runs += 1
        trial = Trial(tmp_path / f"run{runs}", undisturbed.cache)
        trial.start()
        while kill_somewhere(trial, rng, 12.0):
            phases.append(trial.phase())
            trial.start()
        assert trial.wait() == 0, trial.output
        assert_same(trial.workdir, undisturbed.outcome)
    seconds = time.monotonic() - started
    print(f"seed {seed}: {len(phases)} kills of {runs} runs in {seconds:.0f} s: {dict(collections.Counter(phases))}")
