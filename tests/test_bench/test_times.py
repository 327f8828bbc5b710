"""What benches have in common: turns, ratios, and whether the machine was quiet."""

from __future__ import annotations

import pytest

from saisa_jax.bench import times
from saisa_jax.bench.times import Machine, Timed, Watch


def test_turns_go_back_and_forth() -> None:
    calls = {name: (lambda: None) for name in "abc"}
    assert [name for name, _ in times.in_turns(calls, 3)] == list("abccbaabc")


def test_a_call_of_several_counts_each() -> None:
    timed = Timed()
    timed.add(lambda: None, 4)
    timed.add(lambda: None, 1)
    assert len(timed.seconds) == len(timed.processor) == 2
    known = Timed(0, [1.0, 2.0, 3.0, 4.0, 5.0], [1.0])
    assert known.median == 3 and known.spread == pytest.approx(2 / 3)
    assert times.ratios([1.0, 6.0], [2.0, 3.0]) == [0.5, 2.0]


def test_a_busy_machine() -> None:
    quiet, loud = Watch(), Watch()
    quiet.others, loud.others = 0.01, 0.4
    full, half = Machine(1e9, 1e9, 0.97), Machine(1e9, 1e9, 0.55)
    assert times.why_busy(full, [quiet]) == ""
    assert "other programs took 40%" in times.why_busy(full, [quiet, loud])
    assert "got 55% of" in times.why_busy(half, [quiet])
    assert times.why_busy(Machine(1e9, 1e9, None), [quiet]) == ""  # an accelerator


def test_what_others_took(monkeypatch) -> None:
    busy = iter([100.0, 103.0])
    monkeypatch.setattr(times, "_busy_seconds", lambda: next(busy))
    monkeypatch.setattr(times.os, "cpu_count", lambda: 2)
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(times.time, "perf_counter", lambda: next(clock))
    own = iter([5.0, 7.0])
    monkeypatch.setattr(times.time, "process_time", lambda: next(own))
    assert Watch().stop().others == pytest.approx((3 - 2) / 20)


def test_the_machine_is_measured() -> None:
    machine = times.measure_machine("float32", repeat=1, size=64)
    assert machine.flops > 0 and machine.bandwidth > 0 and machine.of_cores is not None
