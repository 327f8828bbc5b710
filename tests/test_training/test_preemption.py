"""Signals become a flag; a directory belongs to one run."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from saisa_jax.training.preemption import RunLockedError, StopSignal, run_lock


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_flag(number, capfd):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        assert stop.requested == number.name
        os.kill(os.getpid(), signal.SIGTERM)  # once more changes nothing
        assert stop.requested == number.name
    assert signal.getsignal(number) is before
    assert f"{number.name}: stopping after this step" in capfd.readouterr().err


def test_a_second_interrupt_stops_at_once():
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_signal_stays_ignored():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.requested is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_another_thread_cannot_catch_signals(caplog):
    def enter():
        with StopSignal() as stop:
            assert stop.requested is None

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "signals do not reach this thread" in caplog.text


HOLD = """
import sys, time
from saisa_jax.training.preemption import run_lock
with run_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_dies_with_its_process(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, env=environment)
    try:
        assert process.stdout.readline() == b"held\n"
        with (
            pytest.raises(RunLockedError, match=rf"in use by process {process.pid} on .*--workdir"),
            run_lock(tmp_path),
        ):
            pass
    finally:
        process.kill()
        process.wait()
    with run_lock(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_one_run_after_the_other(tmp_path):
    with run_lock(tmp_path / "new"):  # noqa: SIM117
        with pytest.raises(RunLockedError, match=f"in use by process {os.getpid()} "), run_lock(tmp_path / "new"):
            pass
    with pytest.raises(KeyError), run_lock(tmp_path / "new"):
        raise KeyError
    with run_lock(tmp_path / "new"):
        pass
