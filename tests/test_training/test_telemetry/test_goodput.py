"""Seconds by what they were spent on, from one start to the next."""

import pytest

from saisa_jax.training.telemetry.goodput import KINDS, Goodput


def spend(clock, time, **seconds):
    for kind, amount in seconds.items():
        with clock(kind):
            time.now += amount


def test_every_second_is_counted_once(time):
    clock = Goodput()
    time.now += 30
    clock.started()
    spend(clock, time, compile=20, data=1, step=40, eval=3, save=4)
    spend(clock, time, data=1)
    time.now += 1  # in between
    assert clock.account() == {
        "start_seconds": 30, "compile_seconds": 20, "data_seconds": 2, "step_seconds": 40, "save_seconds": 4,
        "eval_seconds": 3, "lost_seconds": 0, "other_seconds": 1, "lost_steps": 0,
    }  # fmt: skip
    assert clock.seconds == 100 and clock["data"] == 2
    assert str(clock) == ("1m 40s: start 30.0%, compile 20.0%, data 2.0%, step 40.0%, save 4.0%, eval 3.0%, other 1.0%")


def test_an_error_inside_is_counted(time):
    clock = Goodput()
    with pytest.raises(KeyError), clock("eval"):
        time.now += 5
        raise KeyError
    assert clock["eval"] == 5


def test_restarts_add_up_and_undone_steps_are_lost(time):
    first = Goodput()
    time.now += 10
    first.started()
    spend(first, time, compile=5, step=5)
    saved = first.account()  # step 20
    spend(first, time, step=6)
    rows = [{"kind": "train", "step": 30, "seconds": first.seconds}]
    spend(first, time, step=6)
    rows += [{"kind": "train", "step": 35, "seconds": first.seconds}, {"kind": "eval", "step": 36}]
    # Killed; the step that was running then is in no row.
    second = Goodput()
    time.now += 10
    second.go_on(saved)
    second.lose(rows, 20)
    second.started()
    spend(second, time, compile=2)
    account = second.account()
    assert account["start_seconds"] == 20 and account["compile_seconds"] == 7 and account["step_seconds"] == 5
    assert account["lost_seconds"] == 12 and account["lost_steps"] == 15
    assert second.seconds == sum(account[f"{kind}_seconds"] for kind in KINDS) == 44
    assert "; 15 step(s) were made twice" in str(second)
    third = Goodput()
    third.go_on(account)
    third.lose([], 40)
    assert third.account() == account


def test_killed_before_the_first_checkpoint(time):
    clock = Goodput()
    clock.lose([{"kind": "train", "step": 7, "seconds": 12.0}], 0)
    assert clock.account()["lost_seconds"] == 12 and clock.account()["lost_steps"] == 7
