"""A run that hangs says where, and ends."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from saisa_jax.testing.runs import free_port
from saisa_jax.training import watchdog
from saisa_jax.training.watchdog import Watchdog

ROOT = Path(__file__).parents[2]

# A run of two processes; reading the third batch takes the second one for ever.
HANGS = """
import sys, time
from saisa_jax.data.pipeline import TrainIterator
from saisa_jax.training import processes
read, calls = processes.ProcessSync.read, []
def slow(self, data):
    calls.append(1)
    if processes.jax.process_index() == 1 and len(calls) == 3:
        waits_for_ever()
    return read(self, data)
def waits_for_ever():
    time.sleep(1000)
processes.ProcessSync.read = slow
from saisa_jax.__main__ import main
sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_a_beat_in_time_keeps_it_quiet() -> None:
    stream = io.StringIO()
    with Watchdog(0.4, stream) as dog:
        time.sleep(0.9)  # there was no beat yet
        for _ in range(6):
            dog.beat("a step")
            time.sleep(0.15)
    with Watchdog(0, stream) as dog:
        dog.beat("a step")
    assert stream.getvalue() == ""


def test_stacks_then_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(watchdog.os, "_exit", ended.append)
    with (tmp_path / "log").open("w+") as stream:
        with Watchdog(0.2, stream) as dog:
            dog.beat("step 7")
            deadline = time.monotonic() + 20
            while not ended and time.monotonic() < deadline:
                time.sleep(0.01)
        stream.seek(0)
        said = stream.read()
    assert ended and set(ended) == {1}
    assert "nothing has followed step 7 for 0 s (--config.training.watchdog=0.2)" in said
    assert said.count("What its threads do:") == 1 and "test_stacks_then_the_end" in said
    assert "this process ends, with status 1" in said


@pytest.mark.multi_process
@pytest.mark.slow
def test_one_of_two_processes_hangs(tmp_path: Path) -> None:
    port = free_port()
    flags = ["--xla_force_host_platform_device_count=1", "--xla_backend_optimization_level=0"]
    environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
    started = []
    for process in (0, 1):
        command = [
            sys.executable, "-c", HANGS, "--config=saisa_jax/testing/configs.py", f"--workdir={tmp_path / 'run'}",
            "--config.stages=pretrain", "--config.pretrain.steps=4", "--config.training.watchdog=5",
            "--config.training.eval_every=0", f"--config.distributed.coordinator=127.0.0.1:{port}",
            "--config.distributed.num_processes=2", f"--config.distributed.process_id={process}",
        ]  # fmt: skip
        log = (tmp_path / f"log-{process}").open("w")
        started.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    said = [(tmp_path / f"log-{process}").read_text() for process in (0, 1)]
    assert codes == [1, 1], said
    assert "watchdog of process 1: nothing has followed step 2" in said[1] and "waits_for_ever" in said[1]
