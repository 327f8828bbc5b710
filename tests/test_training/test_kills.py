"""Runs that are killed, stopped, starved or robbed of a file, and started again: they end as if nothing had been."""

from __future__ import annotations

import collections
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from saisa_jax.testing.runs import PACKED, ROOT, Outcome, Trial, environment, kill_somewhere, outcome


class Undisturbed(NamedTuple):
    """A run that nobody stopped."""

    workdir: Path
    outcome: dict[str, Outcome]


def undisturbed_run(directory: Path, *flags: str) -> Undisturbed:
    trial = Trial(directory / "run", *flags)
    assert trial.run() == 0, trial.output
    return Undisturbed(trial.workdir, outcome(trial.workdir))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Undisturbed:
    return undisturbed_run(tmp_path_factory.mktemp("undisturbed"))


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
        trial = Trial(tmp_path / f"run{runs}")
        trial.start()
        while kill_somewhere(trial, rng, 12.0):
            phases.append(trial.phase())
            trial.start()
        assert trial.wait() == 0, trial.output
        assert_same(trial.workdir, undisturbed.outcome)
    seconds = time.monotonic() - started
    print(f"seed {seed}: {len(phases)} kills of {runs} runs in {seconds:.0f} s: {dict(collections.Counter(phases))}")


# --- one run through everything ---------------------------------------------------------------------------------------


def damage(checkpoint: Path, how: str) -> None:
    """Flips bytes in the largest file of a checkpoint, cuts it in half, or removes it."""
    file = max((path for path in (checkpoint / "state").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(byte ^ 255 for byte in content[middle : middle + 8])
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(content if how == "flipped" else content[:middle])


def small_files() -> None:
    """For the process that is about to start: no file may grow beyond 100 kB, as on a disk that is nearly full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_run_that_meets_everything(tmp_path):
    """One stage, to save time: killed, with a flipped checkpoint, on a full disk, stopped, killed at its end."""
    flags = (f"--config={PACKED}", "--config.stages=finetune")
    undisturbed = undisturbed_run(tmp_path, *flags)
    trial = Trial(tmp_path / "stopped", *flags)
    trial.start()
    assert trial.until(lambda: len(trial.committed("finetune")) == 2 and trial.saving()), trial.output
    trial.kill()  # in the middle of a save

    *_, good, bad = trial.committed("finetune")
    damage(trial.workdir / "finetune" / "checkpoints" / str(bad), "flipped")
    assert trial.run(prepare=small_files) == 1
    assert f"FALLING BACK TO STEP {good}" in trial.output and "Traceback" not in trial.output
    said = rf"CheckpointError: step {bad} was not saved in .*File too large.*"
    assert any(re.fullmatch(said, line) for line in trial.output.splitlines())
    assert trial.committed("finetune")[-1] == good

    trial.start()
    assert trial.until(lambda: trial.steps_done() > 1), trial.output
    assert trial.kill(signal.SIGTERM) == 128 + signal.SIGTERM
    assert "SIGTERM: stopping after this step" in trial.output and "Traceback" not in trial.output

    trial.start()
    assert trial.until(trial.saving_model), trial.output
    trial.kill()  # after the last step

    assert trial.run() == 0, trial.output
    assert_same(trial.workdir, undisturbed.outcome)


# --- one thing at a time ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def halfway(undisturbed, tmp_path_factory) -> Path:
    """A run that Ctrl-C has stopped in its second stage; copy it before you touch it."""
    trial = Trial(tmp_path_factory.mktemp("halfway") / "run")
    trial.start()
    assert trial.until(lambda: len(trial.committed("finetune")) == 2), trial.output
    assert trial.kill(signal.SIGINT) == 128 + signal.SIGINT
    assert "SIGINT: stopping after this step, with a checkpoint; Ctrl-C once more stops at once" in trial.output
    assert "Traceback" not in trial.output and not trial.saving()
    return trial.workdir


@pytest.fixture
def stopped(halfway, undisturbed, tmp_path) -> Trial:
    return Trial(shutil.copytree(halfway, tmp_path / "run"))


@pytest.mark.slow
def test_ctrl_c_loses_nothing(stopped, undisturbed):
    assert stopped.run() == 0, stopped.output
    assert_same(stopped.workdir, undisturbed.outcome)


@pytest.mark.slow
def test_ctrl_c_twice_stops_at_once(stopped, undisturbed):
    stopped.start()
    assert stopped.until(lambda: "resumes from step" in stopped.output)  # it will compile for a while
    stopped.process.send_signal(signal.SIGINT)
    assert stopped.until(lambda: "once more stops at once" in stopped.output)
    assert stopped.kill(signal.SIGINT) == 128 + signal.SIGINT
    # (Python may drop the second one, where it comes in a callback of the garbage collector.)
    assert re.search("Stopped at once; the same command|stopped by SIGINT after step", stopped.output)
    assert stopped.run() == 0, stopped.output
    assert_same(stopped.workdir, undisturbed.outcome)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_a_damaged_checkpoint_costs_a_step(stopped, undisturbed, how):
    good, bad = stopped.committed("finetune")
    damage(stopped.workdir / "finetune" / "checkpoints" / str(bad), how)
    assert stopped.run() == 0, stopped.output
    assert f"FALLING BACK TO STEP {good}; the damaged one is now" in stopped.output
    assert_same(stopped.workdir, undisturbed.outcome)


@pytest.mark.slow
def test_nothing_but_damage_is_an_error(stopped):
    for step in (steps := stopped.committed("finetune")):
        damage(stopped.workdir / "finetune" / "checkpoints" / str(step), "truncated")
    assert stopped.run() == 1
    last = stopped.output.strip().splitlines()[-1]
    assert re.match(rf"DamagedError: state of step {steps[1]} .*cannot be read.*state of step {steps[0]} ", last)
    assert "Traceback" not in stopped.output and stopped.committed("finetune") == steps


@pytest.mark.slow
def test_another_recipe_is_an_error(stopped):
    assert stopped.run(flags=("--config.model.mlp_dim=32",)) == 1
    assert re.search(r"^ConfigError: .* holds a run of another recipe: model.mlp_dim=64, now 32", stopped.output, re.M)
    (stopped.workdir / "config.json").unlink()  # and where nobody remembers the recipe, the checkpoint does
    (stopped.workdir / "pretrain" / "model").rename(stopped.workdir / "gone")
    (stopped.workdir / "finetune" / "checkpoints").rename(stopped.workdir / "pretrain" / "checkpoints.new")
    shutil.rmtree(stopped.workdir / "pretrain" / "checkpoints")
    (stopped.workdir / "pretrain" / "checkpoints.new").rename(stopped.workdir / "pretrain" / "checkpoints")
    assert stopped.run() == 1
    last = stopped.output.strip().splitlines()[-1]
    assert "is of another model or recipe: " in last and last.startswith("CheckpointError: step ")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 6 MB: room for a stage and its model, and for a checkpoint or two of the next one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_costs_what_was_not_saved(undisturbed, small_disk):
    trial = Trial(small_disk)
    trial.start()
    assert trial.until(lambda: len(trial.committed("finetune")) == 2), trial.output
    trial.kill()
    free = shutil.disk_usage(small_disk).free
    (small_disk / "other").write_bytes(bytes(max(0, free - 100_000)))
    assert trial.run() == 1
    what = r"^(CheckpointError: step \d+ was not saved in|OSError: ).*(RESOURCE_EXHAUSTED|No space left on device)"
    assert re.search(what, trial.output, re.MULTILINE), trial.output
    assert "Traceback" not in trial.output
    (small_disk / "other").unlink()
    assert trial.run() == 0, trial.output
    assert_same(trial.workdir, undisturbed.outcome)


@pytest.mark.slow
def test_a_stopped_evaluation_goes_on(undisturbed, tmp_path):
    whole = evaluation(undisturbed, tmp_path / "whole")
    assert whole.wait() == 0
    stopped = evaluation(undisturbed, tmp_path / "stopped")
    partial = tmp_path / "stopped" / "evaluation" / "easy_vqa.partial.jsonl"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        before = lines_of(partial)
        while lines_of(partial) <= max(1, before):
            assert stopped.poll() is None
            time.sleep(0.005)
        stopped.send_signal(number)
        output, _ = stopped.communicate()
        assert stopped.returncode == (-number if number == signal.SIGKILL else 128 + number)
        if number != signal.SIGKILL:
            assert re.search(r"stopped after \d+ of 400 questions of easy_vqa\. .*the same command goes on", output)
        assert "Traceback" not in output
        stopped = evaluation(undisturbed, tmp_path / "stopped")
    output, _ = stopped.communicate()
    assert stopped.returncode == 0 and "questions were answered before; the evaluation goes on" in output
    answers = (tmp_path / name / "evaluation" / "easy_vqa.jsonl" for name in ("stopped", "whole"))
    assert next(answers).read_bytes() == next(answers).read_bytes()


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def evaluation(undisturbed: Undisturbed, output: Path) -> subprocess.Popen[str]:
    """`eval.py` on the undisturbed run's model, four questions at a time."""
    flags = [f"--workdir={undisturbed.workdir}", f"--output={output}", "--limit=400", "--batch_size=4"]
    return subprocess.Popen(
        [sys.executable, "eval.py", *flags], cwd=ROOT, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
