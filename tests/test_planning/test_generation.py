"""The programs of an evaluation, compiled for simulated devices: memory, and what goes between them."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from rich.console import Console

from saisa_jax import parallel
from saisa_jax.config import Config, MeshConfig
from saisa_jax.inference import memory
from saisa_jax.inference.memory import Shape
from saisa_jax.planning import generation
from saisa_jax.planning.topologies import parse
from saisa_jax.testing.configs import tiny_config


def larger(alignment: str, mesh: MeshConfig) -> Config:
    """With so many visual tokens that pictures outweigh the parameters."""
    config = tiny_config(alignment)
    vision = dataclasses.replace(config.model.vision, image_size=128)
    return dataclasses.replace(
        config, mesh=mesh, model=dataclasses.replace(config.model, vision=vision, max_length=1024)
    )


@pytest.mark.multi_device
@pytest.mark.parametrize("alignment", ["saisa", "llava"])
def test_rows_of_a_mesh_read_their_own_pictures(alignment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No collective moves pictures; and the estimate of a row's memory is not below the compiler's."""
    monkeypatch.setattr(generation, "devices", lambda topology: jax.devices())
    config = larger(alignment, MeshConfig(4, 1, 2))
    plan = generation.compile_generation(config, parse("v5e:2x4"), Shape(32, 16, 1), "float32", batch_size=32)
    assert plan.ways == 4 and plan.room.rows == 8 and plan.fits
    encode, answer = plan.programs
    assert encode.memory and answer.memory
    for kind, moved in answer.traffic.items():
        # Between the halves of the heads: sums over text, and under LLaVA over the visual tokens beside it.
        assert kind == "all-reduce" or moved.bytes < plan.picture_bytes, (kind, moved)
    if alignment == "saisa":
        assert answer.traffic["all-reduce"].bytes < plan.room.rows * plan.picture_bytes
    mesh = parallel.make_mesh(config.mesh)
    row = memory.row_bytes(config.model_for("finetune"), mesh, plan.shape)
    assert 2 * row < answer.memory.temporaries < 8 * row
    console = Console(width=140, record=True)
    console.print(generation.table(plan, config, "float32"))
    assert "prefill and decode" in console.export_text()


def test_less_memory_holds_fewer_rows_and_pictures() -> None:
    config = larger("saisa", MeshConfig()).model_for("finetune")
    shape, before = Shape(128, 16, 1), None
    for free in (2**20, 2**24, 2**26, 2**28, 2**36):
        room = memory.room(config, None, shape, free)
        pictures = memory.picture_bytes(config, None)
        used = room.rows * memory.row_bytes(config, None, shape) + room.cache_bytes
        assert room.rows == 1 or (used <= free and room.cache_bytes >= room.rows * pictures)
        assert before is None or (room.rows >= before.rows and room.cache_bytes >= before.cache_bytes)
        before = room
    assert before is not None and before.rows == memory.MOST_ROWS
    half = memory.room(config, parallel.make_mesh(MeshConfig(4, 1, 2)), shape, 2**28)
    assert half.rows >= memory.room(config, None, shape, 2**28).rows


def test_a_device_that_reports_its_memory_is_asked() -> None:
    class Device:
        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 1000, "bytes_in_use": 300}

    assert memory.free_bytes([Device()]) == 700
    assert memory.free_bytes(jax.devices()[:1]) > 2**20 and memory.free_bytes(jax.devices()) * 7 < 2**45
