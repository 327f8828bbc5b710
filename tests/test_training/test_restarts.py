"""A run goes on elsewhere: on another mesh and number of devices, from an import, from and with adapters."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from saisa_jax.checkpoints import load_model
from saisa_jax.cli import convert
from saisa_jax.config import TRAIN_ADAPTERS, TRAIN_ALL_BUT_VISION, Config, LoraConfig, MeshConfig
from saisa_jax.testing.checkpoints import write_checkpoint
from saisa_jax.testing.configs import tiny_config
from saisa_jax.testing.runs import timeless_rows
from saisa_jax.training import loop
from saisa_jax.training.optimizer import flatten
from saisa_jax.training.setup import setup_stage


def quiet(config: Config) -> Config:
    """Without held-out evaluations."""
    return dataclasses.replace(config, training=dataclasses.replace(config.training, eval_every=0))


@pytest.fixture
def live(monkeypatch) -> Callable[..., int]:
    """Runs a recipe on some of the devices, until it is finished or SIGTERM comes; returns the loop's answer."""
    to_device = loop.parallel.to_device

    def live(config: Config, workdir: Path, devices: int = 1, mesh: tuple[int, int, int] = (1, 1, 1), stop: int = 0):
        """`stop`: SIGTERM comes when the batch of that step of this life is read; 0: never."""
        batches = []

        def to_device_and_stop(*args):
            batches.append(None)
            if len(batches) == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return to_device(*args)

        monkeypatch.setattr(loop.parallel, "to_device", to_device_and_stop)
        monkeypatch.setattr(loop, "setup_stage", functools.partial(setup_stage, devices=jax.devices()[:devices]))
        return loop.run(dataclasses.replace(config, mesh=MeshConfig(*mesh)), epath.Path(workdir))

    return live


def losses(workdir: Path, stage: str) -> list[float]:
    rows = [row for row in timeless_rows(workdir / stage) if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def params(directory: Path) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten(load_model(str(directory))[0]).items()}


def assert_same_run(ours: Path, theirs: Path, stage: str) -> None:
    """Bit for bit."""
    assert timeless_rows(ours / stage) == timeless_rows(theirs / stage)
    for name in ("model", "adapter"):
        if (theirs / stage / name).exists():
            a, b = params(ours / stage / name), params(theirs / stage / name)
            assert a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


@pytest.mark.multi_device
def test_eight_devices_then_one_then_four(live, tmp_path):
    config = dataclasses.replace(quiet(tiny_config()), stages=("finetune",))
    assert live(config, tmp_path / "whole") == 0  # on one device
    moved = tmp_path / "moved"
    assert live(config, moved, 8, (2, 2, 2), stop=1) == signal.SIGTERM
    assert live(config, moved, 1, (1, 1, 1), stop=1) == signal.SIGTERM
    assert live(config, moved, 4, (1, 2, 2)) == 0
    np.testing.assert_allclose(losses(moved, "finetune"), losses(tmp_path / "whole", "finetune"), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.multi_device
def test_from_stage_1_to_stage_2_on_another_mesh(live, tmp_path):
    config = quiet(tiny_config())
    assert live(config, tmp_path / "whole") == 0
    moved = tmp_path / "moved"
    assert live(dataclasses.replace(config, stages=("pretrain",)), moved, 8, (1, 4, 2)) == 0
    assert live(config, moved, 4, (4, 1, 1), stop=1) == signal.SIGTERM
    assert live(config, moved, 2, (1, 1, 2), stop=1) == signal.SIGTERM
    assert live(config, moved, 8, (8, 1, 1)) == 0
    for stage in ("pretrain", "finetune"):
        np.testing.assert_allclose(losses(moved, stage), losses(tmp_path / "whole", stage), rtol=1e-5)


@pytest.mark.slow
def test_from_an_import(live, tmp_path):
    """Stopped and started again, with frozen parameters that live in the import alone."""
    start = tmp_path / "start"
    for name, layout in (("llm", "hf-llm"), ("encoder", "hf-vision")):
        write_checkpoint(tmp_path / name, layout)
    convert.main(["import", f"--llm={tmp_path / 'llm'}", f"--vision={tmp_path / 'encoder'}", f"--to={start}"])
    imported = load_model(str(start))[1]
    config = quiet(tiny_config())
    finetune = dataclasses.replace(config.finetune, groups=TRAIN_ALL_BUT_VISION)
    config = dataclasses.replace(
        config, stages=("finetune",), init_from=str(start), model=imported.model, finetune=finetune,
        data=dataclasses.replace(config.data, tokenizer=f"{start}/tokenizer"),
    )  # fmt: skip
    assert live(config, tmp_path / "whole") == 0
    assert live(config, tmp_path / "stopped", stop=1) == signal.SIGTERM
    assert live(config, tmp_path / "stopped", stop=1) == signal.SIGTERM
    assert live(config, tmp_path / "stopped") == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole", "finetune")


@pytest.mark.slow
def test_with_adapters_and_from_them(live, tmp_path):
    config = quiet(tiny_config())
    assert live(dataclasses.replace(config, stages=("pretrain",)), tmp_path / "start") == 0
    lora = dataclasses.replace(config.finetune, groups=TRAIN_ADAPTERS, lora=LoraConfig(rank=4, alpha=8.0))
    adapted = dataclasses.replace(
        config, stages=("finetune",), init_from=str(tmp_path / "start" / "pretrain" / "model"), finetune=lora
    )
    assert live(adapted, tmp_path / "whole") == 0
    assert live(adapted, tmp_path / "stopped", stop=1) == signal.SIGTERM
    assert live(adapted, tmp_path / "stopped", stop=2) == signal.SIGTERM  # after the last step, before the merging
    assert not (tmp_path / "stopped" / "finetune" / "model").exists()
    assert live(adapted, tmp_path / "stopped") == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole", "finetune")

    # From the merged model a run goes on as from any other, and is none the worse for being stopped.
    merged = tmp_path / "stopped" / "finetune" / "model"
    further = dataclasses.replace(config, stages=("finetune",), init_from=str(merged))
    assert live(further, tmp_path / "whole2") == 0
    assert live(further, tmp_path / "stopped2", stop=2) == signal.SIGTERM
    assert live(further, tmp_path / "stopped2") == 0
    assert_same_run(tmp_path / "stopped2", tmp_path / "whole2", "finetune")
    before, after = params(merged), params(tmp_path / "whole2" / "finetune" / "model")
    assert before.keys() == after.keys() and any(not np.array_equal(before[path], after[path]) for path in before)
