"""What to change when a step does not fit: cheap changes first, by arithmetic before anything is compiled."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from saisa_jax.config import Config, ConfigError, ModelConfig
from saisa_jax.planning.compile import Program, compile_stage
from saisa_jax.planning.topologies import Topology, devices
from saisa_jax.training.memory import SURE, step_bytes
from saisa_jax.training.setup import setup_stage

ACCUMULATIONS = range(1, 17)
TRIES = 3  # compilations at most; each takes minutes


class Remedy(NamedTuple):
    """Flags that change a configuration, and what it becomes."""

    flags: Mapping[str, Any]
    config: Config

    def __str__(self) -> str:
        return " ".join(f"--config.{name}={value}" for name, value in self.flags.items())


def candidates(config: Config, stage: str, topology: Topology) -> Iterator[Remedy]:
    """Changes in the order in which they should be tried: recomputation, the state over all chips and attention without
    scores in memory, and then more and more micro-batches. Last the same with a lighter first moment, which is the only
    one of them that changes what is computed."""
    settings = config.stage(stage)
    mesh = dataclasses.replace(config.mesh, data=config.mesh.dcn, fsdp=-1)
    model = dataclasses.replace(config.model, remat_policy="full", attention_impl=_attention(config.model, topology))
    moments = dict.fromkeys((settings.optimizer.first_moment_dtype, "bfloat16"))
    for moment, accumulation in itertools.product(moments, ACCUMULATIONS):
        if accumulation < settings.accumulation or settings.batch_size % accumulation:
            continue
        optimizer = dataclasses.replace(settings.optimizer, first_moment_dtype=moment)
        changed = dataclasses.replace(settings, accumulation=accumulation, optimizer=optimizer)
        parts = {stage: changed, "mesh": mesh, "model": model}
        remedy = dataclasses.replace(config, **parts)
        now, new = _values(config, stage), _values(remedy, stage)
        if flags := {name: value for name, value in new.items() if value != now[name]}:
            yield Remedy(flags, remedy)


def _values(config: Config, stage: str) -> dict[str, Any]:
    """What a remedy may change, by flag."""
    settings = config.stage(stage)
    return {
        "model.remat_policy": config.model.remat_policy,
        "mesh.data": config.mesh.data,
        "mesh.fsdp": config.mesh.fsdp,
        "model.attention_impl": config.model.attention_impl,
        f"{stage}.accumulation": settings.accumulation,
        f"{stage}.optimizer.first_moment_dtype": settings.optimizer.first_moment_dtype,
    }


def _attention(model: ModelConfig, topology: Topology) -> str:
    """The kernel of the topology's chips, if it serves the model (`models/attention*.py`)."""
    serves = model.dtype == "bfloat16" and model.head_dim % 8 == 0 and model.attention_impl == "xla"
    return ("cudnn" if topology.on_gpu else "flash") if serves else model.attention_impl


def find(config: Config, stage: str, topology: Topology, steps: int) -> tuple[Remedy, Program] | None:
    """The first remedy that compiles and fits; None: none of those tried does."""
    room = topology.chip.hbm / topology.chip.devices
    tries = 0
    for remedy in candidates(config, stage, topology):
        try:
            prepared = setup_stage(remedy.config, stage, steps, devices(topology))
        except ConfigError:
            continue  # its rows do not divide by the mesh
        state, chunk = prepared.abstract_state(), config.training.loss_chunk
        of_step = prepared.model, prepared.settings, prepared.mesh, state, chunk, prepared.teacher
        if step_bytes(*of_step) > SURE * room:
            continue
        program = compile_stage(remedy.config, stage, topology, steps)
        if program.fits:
            return remedy, program
        tries += 1
        if tries == TRIES:
            break
    return None
