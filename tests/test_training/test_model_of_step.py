"""A model of any step: the same as a finished one, and the way on that a run with a loss that is not finite tells."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from saisa_jax import __main__ as program
from saisa_jax.checkpoints import CheckpointError, load_model
from saisa_jax.cli.flags import read_config
from saisa_jax.config import ConfigError
from saisa_jax.training import loop, model_of_step
from saisa_jax.training.loop import TrainingError
from saisa_jax.training.model_of_step import find_step
from saisa_jax.training.optimizer import flatten

RECIPE = (
    "--config=saisa_jax/testing/configs.py",
    "--config.training.eval_every=0",
    "--config.training.checkpoint_every=1",
    "--config.finetune.steps=4",
)


def params_of(model: Path) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten(load_model(str(model))[0]).items()}


def train(workdir: str, *flags: str) -> int:
    return loop.run(read_config([*RECIPE, *flags]), epath.Path(workdir))


def test_what_a_run_that_is_not_finite_says_can_be_followed(tmp_path, capsys, monkeypatch):
    workdir = str(tmp_path / "run")
    with pytest.raises(TrainingError) as error:
        train(workdir, "--config.finetune.optimizer.lr=1e30")
    said = str(error.value)
    assert "at step 3 of finetune" in said and "Step 2 is the last good one" in said
    # The steps of stage 1 are its own finished model.
    same = params_of(tmp_path / "run" / "pretrain" / "model")
    for form in (f"{workdir}/pretrain/checkpoints/3", f"{workdir}@3"):
        assert program.main(["checkpoint", "export", f"--from={form}", f"--to={tmp_path / 'three'}"]) == 0
        exported = params_of(tmp_path / "three")
        assert exported.keys() == same.keys()
        assert all(np.array_equal(exported[path], same[path]) for path in same)
    with pytest.raises(CheckpointError, match=r"no step 7 in .*pretrain: 2, 3; finetune: 1, 2"):
        find_step(f"{workdir}@7")
    with pytest.raises(CheckpointError, match=r"pretrain@2 or .*finetune@2"):
        find_step(f"{workdir}@2")
    with pytest.raises(CheckpointError, match="expected WORKDIR/STAGE/checkpoints/N"):
        find_step(workdir)
    # The commands, word by word; from the step before, since a rate of 1e30 has spoiled the last one.
    (export,) = re.findall(r"python -m saisa_jax (checkpoint export .*)", said)
    argv = export.replace("MODEL", str(tmp_path / "model")).split()
    assert program.main(argv) == 0 and "46,336 parameters" in capsys.readouterr().out
    (flags,) = re.findall(r"the same command with (--workdir\S+ .*?)\. ", said)
    other, lr, start, stages = flags.split()
    assert (other, lr) == (f"--workdir={workdir}-2", "--config.finetune.optimizer.lr=5e+29")
    assert (start, stages) == (f"--config.init_from={workdir}/finetune@2", "--config.stages=finetune")
    again = lr.replace("5e+29", "1e-3"), start.replace("@2", "@1"), stages
    monkeypatch.setattr(model_of_step.jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"several, make a model of it first: .*checkpoint export"):
        model_of_step.save_start(read_config([*RECIPE, *again]), epath.Path(other.removeprefix("--workdir=")))
    monkeypatch.undo()
    assert train(other.removeprefix("--workdir="), *again) == 0
    assert (tmp_path / "run-2" / "start" / "model.json").exists()
    assert (tmp_path / "run-2" / "finetune" / "model" / "model.json").exists()
