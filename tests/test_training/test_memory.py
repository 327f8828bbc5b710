"""Memory of a step by arithmetic: what policies keep, and which of them fits."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from saisa_jax import parallel
from saisa_jax.chips import GIB
from saisa_jax.config import LIGHTEST_FIRST, TRAIN_ALL_BUT_VISION, MeshConfig
from saisa_jax.testing.configs import tiny_config
from saisa_jax.training import memory
from saisa_jax.training.memory import SURE, kept_bytes, lightest_remat, step_bytes
from saisa_jax.training.setup import setup_stage

CONFIG = tiny_config()
MODEL = dataclasses.replace(CONFIG.trained_model("finetune"), attention_impl="xla")
ROWS = TRAIN_ALL_BUT_VISION, 2, CONFIG.finetune.text_length, CONFIG.finetune.max_images


def test_a_layer_keeps_its_input_and_what_is_named() -> None:
    """In float32, of 2 rows: x under `full`; q, the attended, gate and up as well under `names`."""
    c, tokens = MODEL, MODEL.num_layers * 2 * CONFIG.finetune.text_length
    full, names, dots, none = (
        kept_bytes(dataclasses.replace(c, remat_policy=policy), *ROWS) for policy in ("full", "names", "dots", "none")
    )
    assert full == 4 * tokens * c.embed_dim
    assert names == full + 4 * tokens * (2 * c.num_heads * c.head_dim + 2 * c.mlp_dim)
    assert names < dots < none


def test_halves_of_heads_and_widths_keep_half_but_for_the_stream() -> None:
    named = dataclasses.replace(MODEL, remat_policy="names")
    whole, half = (kept_bytes(memory._part(named, ways), *ROWS) for ways in (1, 2))
    stream = kept_bytes(dataclasses.replace(MODEL, remat_policy="full"), *ROWS)
    assert half - stream == (whole - stream) / 2


def test_auto_is_the_lightest_that_fits() -> None:
    stage = setup_stage(dataclasses.replace(CONFIG, mesh=MeshConfig(1, 1, 1)), "finetune", 10, jax.devices()[:1])
    of_stage = stage.settings, stage.mesh, stage.abstract_state(), 0
    needed = [step_bytes(dataclasses.replace(stage.model, remat_policy=name), *of_stage) for name in LIGHTEST_FIRST]
    assert needed == sorted(needed, reverse=True)
    for name, bytes_ in zip(LIGHTEST_FIRST, needed, strict=True):
        chosen, because = lightest_remat(stage.model, *of_stage, available=1.001 * bytes_ / SURE)
        assert chosen == name and "GiB a device" in because
    assert lightest_remat(stage.model, *of_stage, available=1.0)[0] == "full"  # the compiler will refuse it


@pytest.mark.parametrize(("available", "chosen"), [(None, "full"), (GIB, "none")])
def test_a_stage_settles_auto_and_says_so(available, chosen, monkeypatch, caplog) -> None:
    monkeypatch.setattr("saisa_jax.training.setup.room", lambda devices: available)
    auto = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, remat_policy="auto"))
    with caplog.at_level("INFO", "absl"):
        assert setup_stage(auto, "finetune", 10).model.remat_policy == chosen
    assert f"finetune: model.remat_policy=auto is {chosen}: " in caplog.text


def test_processes_agree_on_the_least_unless_the_devices_are_one_processs(monkeypatch) -> None:
    device = lambda process, gib: SimpleNamespace(  # noqa: E731
        process_index=process, device_kind="GPU", memory_stats=lambda: {"bytes_limit": gib * GIB}
    )
    gathered = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        memory.multihost_utils, "process_allgather", lambda mine: gathered.append(mine) or np.array([mine, 30])
    )
    assert memory.room([device(0, 40), device(0, 41)]) == 40 * GIB and not gathered
    assert memory.room([device(0, 40), device(1, 30)]) == 30 * GIB and gathered == [40]


def test_the_devices_of_this_machine_do_not_tell() -> None:
    assert memory.room(parallel.make_mesh(MeshConfig(-1, 1, 1)).devices.flatten().tolist()) is None
