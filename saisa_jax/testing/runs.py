"""Runs of `train.py` as processes of their own, to be killed, starved and started again; and what they leave behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[2]
PACKED = "saisa_jax/testing/configs.py:packed"
_CLOCK = re.compile(r"second|mfu|bytes|wait|goodput|lost")  # names of what no two runs have in common


def environment(devices: int = 1) -> dict[str, str]:
    """This process's, for one on so many simulated devices."""
    others = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    return os.environ | {
        "XLA_FLAGS": f"{others} --xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }


def free_port() -> int:
    """Of this machine's loopback interface."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Trial:
    """One workdir, trained by one process after the other, all with the same command.

    Args:
      workdir: of the run; what the processes print goes into files beside it.
      flags: of `train.py`, besides --workdir.
    """

    def __init__(self, workdir: Path, *flags: str):
        self.workdir, self._flags = workdir, flags or (f"--config={PACKED}",)
        self.starts = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0.0

    def start(self, prepare: Callable[[], None] | None = None, devices: int = 1, flags: tuple[str, ...] = ()) -> None:
        """Starts `train.py`.

        Args:
          prepare: runs in the new process before anything else.
          devices: that the CPU is to look like.
          flags: more of them.
        """
        self.starts += 1
        command = [sys.executable, "train.py", f"--workdir={self.workdir}", *self._flags, *flags]
        with self._log.open("wb") as log:
            self.started = time.time()
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(devices),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=prepare,
            )

    @property
    def _log(self) -> Path:
        return self.workdir.parent / f"{self.workdir.name}.{self.starts}.log"

    @property
    def output(self) -> str:
        """What the latest process has printed so far."""
        return self._log.read_text(errors="replace")

    def wait(self, seconds: float = 300) -> int:
        """Returns the exit status of the latest process."""
        assert self.process
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()

    def run(self, *args: Any, **kwargs: Any) -> int:
        """`start` and `wait`."""
        self.start(*args, **kwargs)
        return self.wait()

    def until(self, happened: Callable[[], Any], delay: float = 0.0, seconds: float = 300) -> bool:
        """Waits until something has happened, and `delay` seconds more; whether it has before the process ended."""
        assert self.process
        deadline = time.monotonic() + seconds
        while not happened():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.output
            time.sleep(0.002)
        time.sleep(delay)
        return self.process.poll() is None

    def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Sends a signal and waits; returns the exit status."""
        assert self.process
        self.process.send_signal(number)
        return self.wait()

    # --- where it is --------------------------------------------------------------------------------------------------

    def committed(self, stage: str) -> list[int]:
        """The steps of a stage that can be gone back to."""
        return sorted(int(path.name) for path in (self.workdir / stage).glob("checkpoints/*") if path.name.isdigit())

    def saving(self) -> list[Path]:
        """What Orbax has begun to write since the latest start and not finished."""
        return [path for path in self.workdir.glob("*/checkpoints/*.orbax-checkpoint-tmp") if self._is_new(path)]

    def saving_model(self) -> bool:
        """Whether a stage's finished model is being written."""
        return any(map(self._is_new, self.workdir.glob("*/.model.unfinished")))

    def _is_new(self, path: Path) -> bool:
        try:
            return path.stat().st_ctime > self.started - 0.1
        except OSError:
            return False

    def steps_done(self) -> int:
        """Of the latest process."""
        return len(re.findall(r": step \d+/\d+ ", self.output))

    def phase(self) -> str:
        """What the latest process was doing when it ended."""
        if self.saving():
            return "save"
        if self.saving_model():
            return "final model"
        marks = re.findall(r"(starts? from)|(read \d+ samples|goes on from step)|: step (\d+)/(\d+) ", self.output)
        if not marks:
            return "start, data"
        starting, compiling, step, steps = marks[-1]
        if starting:
            return "between stages" if (self.workdir / "pretrain" / "model").exists() else "start, data"
        if compiling:
            return "restore, compile"
        return "end of a stage" if step == steps else "steps"


class Outcome(NamedTuple):
    """What two runs of one recipe have in common, bit for bit, however often they were stopped."""

    rows: list[dict[str, Any]]  # of metrics.jsonl
    model: dict[str, Any]  # every array's checksum, and the summary
    position: dict[str, Any]  # of the last checkpoint: data, checksums of parameters and moments
    events: dict[tuple[str, int], float]  # what TensorBoard shows


def outcome(workdir: Path) -> dict[str, Outcome]:
    """A finished run's outcome, by stage, without clocks and paths."""
    return {stage: _of_stage(workdir / stage) for stage in ("pretrain", "finetune") if (workdir / stage).exists()}


def _of_stage(directory: Path) -> Outcome:
    model = json.loads((directory / "model" / "model.json").read_text())
    steps = sorted(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdigit())
    meta = json.loads((directory / "checkpoints" / str(steps[-1]) / "meta" / "metadata").read_text())
    summary = _timeless(model["metadata"]) | {"start": None}
    position = {"steps": steps, "data": meta["data"], "leaves": meta["leaves"], **_timeless(meta["metadata"])}
    return Outcome(
        timeless_rows(directory),
        {"leaves": model["leaves"], **summary},
        position,
        shown_events(directory / "tensorboard"),
    )


def timeless_rows(directory: Path) -> list[dict[str, Any]]:
    """A stage's metrics without clocks."""
    rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [_timeless(row) for row in rows if not _CLOCK.search(row["kind"])]


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not _CLOCK.search(name)}


def shown_events(directory: Path) -> dict[tuple[str, int], float]:
    """{(tag, step): value} of what TensorBoard shows: events of a step that was purged later are hidden.

    Raises:
      AssertionError: a value is there twice, which would be drawn as a line that goes back.
    """
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]  (protobuf makes it)

    shown: dict[tuple[str, int], float] = {}
    for path in sorted(directory.glob("events.*"), key=lambda path: path.stat().st_ctime):
        content = path.read_bytes()
        while len(content) >= 12:  # length, its checksum, the event, its checksum
            length = int.from_bytes(content[:8], "little")
            if len(content) < 16 + length:
                break  # cut short by a kill; TensorBoard skips it as well
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.HasField("session_log"):
                shown = {(tag, step): value for (tag, step), value in shown.items() if step < event.step}
            for value in event.summary.value:
                if _CLOCK.search(value.tag):
                    continue
                key = value.tag, event.step
                assert key not in shown, f"{path}: {key} twice"
                shown[key] = value.simple_value
    return dict(sorted(shown.items()))


# --- kills at chosen moments -----------------------------------------------------------------------------------------


def kill_somewhere(trial: Trial, rng: np.random.Generator, seconds: float) -> bool:
    """Lets the latest process of a trial live until a random moment: any, in a save, in that of a model, or in a step.

    Args:
      seconds: that an undisturbed run takes.

    Returns:
      False: it was finished before.
    """
    moment = rng.choice(["any", "save", "save", "model", "step"])
    if moment == "any":
        alive = trial.until(lambda: True, rng.uniform(0, seconds))
    elif moment == "save":
        saves: set[Path] = set()
        wanted = rng.integers(1, 4)
        alive = trial.until(lambda: saves.update(trial.saving()) or len(saves) >= wanted, rng.uniform(0, 0.05))
    elif moment == "model":
        alive = trial.until(trial.saving_model, rng.uniform(0, 0.1))
    else:
        wanted = rng.integers(0, 3)
        alive = trial.until(lambda: trial.steps_done() > wanted, rng.uniform(0, 0.3))
    if alive:
        trial.kill()
    return alive
