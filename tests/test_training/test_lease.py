"""A lease is held by one run, found dead by those who watch it, and given up by whoever was robbed of it."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from functools import partial

import pytest

from saisa_jax.training import preemption
from saisa_jax.training.lease import Lease, RunLockedError
from saisa_jax.training.preemption import StopSignal, run_lock

Quick = partial(Lease, renewal=0.4, settling=0.05)
OTHER = '{"holder": "process 7 on elsewhere", "token": "other", "time": "2026-01-01T00:00:00+00:00"}'


def test_is_there_while_it_is_held_and_is_renewed(tmp_path):
    with Quick(tmp_path) as lease:
        first = json.loads((tmp_path / ".lease").read_text())
        assert first.keys() == {"holder", "host", "pid", "time", "token", "beat"} and first["pid"] == os.getpid()
        time.sleep(1.0)
        later = json.loads((tmp_path / ".lease").read_text())
        assert later["beat"] > first["beat"] and later["token"] == first["token"]
        lease.check()
    assert not (tmp_path / ".lease").exists()
    with pytest.raises(KeyError), Quick(tmp_path):
        raise KeyError
    assert not (tmp_path / ".lease").exists()


def test_a_living_holder_is_named(tmp_path):
    with Quick(tmp_path):
        started = time.monotonic()
        message = rf"in use by process {os.getpid()} on .*which lives.*every 0.4 s.*free in 1.6 s.*--workdir"
        with pytest.raises(RunLockedError, match=message), Quick(tmp_path):
            pass
        assert time.monotonic() - started < 1.5  # at the first renewal that is seen
        assert (tmp_path / ".lease").exists()


@pytest.mark.parametrize("left", [OTHER, '{"holder": "proc'])
def test_a_dead_one_is_taken_over_by_the_watchers_own_clock(tmp_path, caplog, left):
    (tmp_path / ".lease").write_text(left)
    started = time.monotonic()
    with Quick(tmp_path) as lease:
        assert time.monotonic() - started >= 1.6
        lease.check()
    assert "is dead" in caplog.text
    assert ("process 7 on elsewhere (last renewed at 2026" in caplog.text) == (left == OTHER)


def test_one_that_is_given_up_is_free_at_once(tmp_path):
    (tmp_path / ".lease").write_text(OTHER)
    threading.Timer(0.3, (tmp_path / ".lease").unlink).start()
    started = time.monotonic()
    with Quick(tmp_path):
        assert time.monotonic() - started < 1.5


def test_who_was_robbed_stops_and_leaves_the_others_lease(tmp_path):
    with Quick(tmp_path) as lease, StopSignal(lease.check) as stop:
        assert stop.requested is None
        (tmp_path / ".lease").write_text(OTHER)
        time.sleep(1.0)
        with pytest.raises(RunLockedError, match=r"taken over by process 7 on elsewhere .*for 1.6 s.*writes nothing"):
            _ = stop.requested
    assert (tmp_path / ".lease").read_text() == OTHER


def test_who_has_slept_looks_before_it_writes(tmp_path):
    with Quick(tmp_path) as lease:
        lease._ended.set()  # no more renewals, as on a machine that is suspended
        time.sleep(0.9)
        lease.check()  # nobody came: it is renewed
        (tmp_path / ".lease").write_text(OTHER)
        time.sleep(0.9)
        with pytest.raises(RunLockedError, match="taken over by process 7"):
            lease.check()


def test_a_bucket_out_of_reach_is_no_reason_to_stop(tmp_path, caplog, monkeypatch):
    with Quick(tmp_path) as lease:
        with monkeypatch.context() as patched:
            patched.setattr(lease, "_read", lambda: 1 / 0)
            time.sleep(1.0)
        lease.check()
    assert "was not renewed: division by zero" in caplog.text


def test_of_those_that_start_together_one_stays(tmp_path):
    together, done, outcomes = threading.Barrier(4), threading.Event(), []

    def start():
        together.wait()
        try:
            with Lease(tmp_path, renewal=1.0, settling=0.5):
                outcomes.append("holds")
                done.wait()
        except RunLockedError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while len(outcomes) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    done.set()
    for thread in threads:
        thread.join()
    assert outcomes.count("holds") == 1 and len(outcomes) == 4


def test_a_bucket_and_a_drive_without_locks(bucket, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(preemption, "Lease", Quick)
    with run_lock("gs://bucket/locked") as guard:
        assert guard is not None
        guard()
        assert [path.name for path in (bucket / "locked").iterdir()] == [".lease"]
        with (
            pytest.raises(RunLockedError, match=r"gs://bucket/locked is in use by process"),
            run_lock("gs://bucket/locked"),
        ):
            pass
    assert not list((bucket / "locked").iterdir())

    def no_locks(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with run_lock(tmp_path):
        assert (tmp_path / ".lease").exists()
    assert "cannot be locked ([Errno 95] Operation not supported): a lease in it will do" in caplog.text
