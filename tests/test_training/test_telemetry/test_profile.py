"""A trace of some steps: whole, cut short, partly done before, and never reached."""

import logging

import jax.numpy as jnp
import pytest
from etils import epath

from saisa_jax.config import ConfigError, ProfileConfig
from saisa_jax.training.telemetry import profile
from saisa_jax.training.telemetry.profile import Profiler


@pytest.fixture
def calls(monkeypatch):
    """What is asked of JAX's profiler."""
    calls = []
    monkeypatch.setattr(profile.jax.profiler, "start_trace", lambda directory, **kwargs: calls.append("start"))
    monkeypatch.setattr(profile.jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def train(steps: tuple[int, ...], first: int, last: int, calls: list) -> list:
    with Profiler(ProfileConfig(steps), epath.Path("profile"), first) as profiler:
        for step in range(first + 1, last + 1):
            calls.append(step)
            profiler.started(step, jnp.zeros(()))
    return calls


@pytest.mark.parametrize(
    ("steps", "first", "expected"),
    [
        ((), 0, [1, 2, 3, 4, 5]),
        ((3, 4), 0, [1, 2, "start", 3, 4, "stop", 5]),
        ((1, 1), 0, ["start", 1, "stop", 2, 3, 4, 5]),
        ((2, 4), 2, ["start", 3, 4, "stop", 5]),  # goes on in the middle
        ((4, 9), 0, [1, 2, 3, "start", 4, 5, "stop"]),  # the stage, or the start, ends before
    ],
)
def test_traced_steps(steps, first, expected, calls):
    assert train(steps, first, 5, calls) == expected


def test_an_error_closes_the_trace(calls):
    with pytest.raises(KeyboardInterrupt), Profiler(ProfileConfig((1, 9)), epath.Path("profile")):
        raise KeyboardInterrupt
    assert calls == ["start", "stop"]


@pytest.mark.parametrize(("steps", "first"), [((7, 9), 0), ((1, 2), 3)])
def test_steps_that_are_not_made_are_said(steps, first, calls, caplog):
    with caplog.at_level(logging.WARNING):
        assert "start" not in train(steps, first, 5, calls)
    assert f"no trace of profile.steps={steps[0]},{steps[1]}: this start made the steps after {first}" in caplog.text


@pytest.mark.parametrize("steps", [(3,), (0, 2), (5, 4), (1, 2, 3)])
def test_wrong_ranges(steps):
    with pytest.raises(ConfigError, match=r"--config.profile.steps=10,15"):
        ProfileConfig(steps)
