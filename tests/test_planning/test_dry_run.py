"""`train.py --dry_run`: what it says agrees with what a run would do."""

from __future__ import annotations

import dataclasses
import math

import jax
import pytest

from saisa_jax import flops
from saisa_jax.config import Config, ConfigError, MeshConfig
from saisa_jax.planning import dry_run
from saisa_jax.testing.configs import tiny_config
from saisa_jax.training.setup import setup_stage


def on(mesh: MeshConfig, stage: str = "finetune") -> Config:
    return dataclasses.replace(tiny_config(), mesh=mesh, stages=(stage,))


def cells(table) -> dict[str, list[str]]:
    """Rows of a table by their first cell."""
    columns = [list(column.cells) for column in table.columns]
    return {name: [column[i] for column in columns[1:]] for i, name in enumerate(columns[0])}


def test_configuration_of_the_stages_that_run() -> None:
    fields = dry_run.resolved(on(MeshConfig()))
    assert fields["finetune.optimizer.lr"] == 1e-3 and fields["mesh.data"] == -1
    assert not any(name.startswith("pretrain.") for name in fields)


@pytest.mark.multi_device
def test_tables_of_a_mesh() -> None:
    prepared = setup_stage(on(MeshConfig(data=2, fsdp=2, tensor=2)), "finetune", 3)
    params = cells(dry_run.parameters(prepared))
    assert params["layers/attn/q_proj/kernel"] == [
        ".* (lr x 1)", "2 x 32 x 4 x 8", "float32", "-, fsdp, tensor, -", "2.00 KiB",
    ]  # fmt: skip
    assert params["layers/input_norm/scale"][3] == "-, -"
    images = cells(dry_run.batch(prepared))["images"]
    assert images == ["8 x 1 x 32 x 32 x 3", "uint8", "data+fsdp, -, -, -, -", "6.00 KiB"]

    state = prepared.abstract_state()
    whole = sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(state.trainable)) / 1024
    memory = {name: float(row[0].split()[0]) for name, row in cells(dry_run.memory(prepared)).items()}
    assert whole / 4 < memory["parameters that train"] < whole / 2  # over fsdp and tensor, norms and biases whole
    assert memory["moments"] == pytest.approx(2 * memory["parameters that train"], abs=0.1)
    assert memory["gradients, within a step"] == memory["parameters that train"]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_flops_by_part_are_those_of_the_step(stage: str) -> None:
    prepared = setup_stage(on(MeshConfig(), stage), stage, 3)
    s = prepared.settings
    work = cells(dry_run.work(prepared))
    total = flops.train_step(prepared.model, s.groups, s.batch_size, s.text_length, s.max_images)
    assert set(work) == {*flops.PARTS, "all"}
    assert sum(float(cell) for cell in work["all"][:2]) == pytest.approx(total / 1e6, abs=0.001)


def test_the_whole_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Without data or accelerator; how many steps an unknown source makes is not guessed."""
    config = tiny_config()
    unknown = dataclasses.replace(config.finetune, steps=None)
    assert dry_run.run(dataclasses.replace(config, finetune=unknown, mesh=MeshConfig(data=4, fsdp=2))) == 0
    said = capsys.readouterr().out
    assert "pretrain on 8 x cpu (data 4 x fsdp 2 x tensor 1): 3 steps, 8 rows a step, which hold about 8" in said
    assert "how many steps is unknown without the data" in said
    assert "finetune.batch_size = 8\n" in said and "layers/visual_proj/fc1/kernel" in said


@pytest.mark.parametrize(
    ("mesh", "flag"),
    [(MeshConfig(data=1, fsdp=3), "set --config.mesh.data, .fsdp"), (MeshConfig(data=1, tensor=8), "num_heads=4")],
)
def test_a_mesh_that_does_not_suit_the_devices(mesh: MeshConfig, flag: str) -> None:
    with pytest.raises(ConfigError, match=rf"{flag}.*name those of the run with --topology=v5e:4x4"):
        dry_run.run(on(mesh))


def test_a_topology_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match="names no known chip"):
        dry_run.run(on(MeshConfig()), "v5x:4x4")


@pytest.mark.aot
def test_a_topology_is_compiled_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run.run(on(MeshConfig(data=1, fsdp=4)), "v5e:2x2") == 0
    said = capsys.readouterr().out
    assert "finetune on v5e:2x2 (data 1 x fsdp 4 x tensor 1)" in said and "finetune fits v5e:2x2" in said
