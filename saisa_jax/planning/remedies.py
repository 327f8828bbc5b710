"""What to change when a step does not fit: cheap changes first, by arithmetic before anything is compiled."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from saisa_jax.config import Config, ConfigError, ModelConfig
from saisa_jax.planning.compile import Program, compile_stage, device_bytes
from saisa_jax.planning.topologies import Topology, devices
from saisa_jax.training.setup import StageSetup, setup_stage

ACCUMULATIONS = range(1, 17)
TRIES = 3  # compilations at most; each takes minutes
SURE = 0.9  # of the memory; the arithmetic is no better than that


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
        if estimate(prepared, remedy.config.training.loss_chunk) > SURE * room:
            continue
        program = compile_stage(remedy.config, stage, topology, steps)
        if program.fits:
            return remedy, program
        tries += 1
        if tries == TRIES:
            break
    return None


def estimate(prepared: StageSetup, loss_chunk: int = 0) -> float:
    """Bytes of one device at the height of a step, to a quarter or so: state, gradients, and what is kept and what is
    in use of the activations."""
    c, s, mesh = prepared.model, prepared.settings, prepared.mesh.shape
    tensor = mesh["tensor"]
    rows = s.batch_size / (mesh["data"] * mesh["fsdp"] * s.accumulation)
    visual = s.max_images * c.vision.num_patches
    asking = s.text_length + (visual if c.alignment == "llava" else 0)
    width = jax.numpy.dtype(c.dtype).itemsize

    state = prepared.abstract_state()
    floats = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float32", sharding=x.sharding), state.trainable)
    gradients = device_bytes(floats) * (1 if s.accumulation == 1 else 2)  # the sum so far, and the next ones
    carried = rows * (asking + (visual if c.alignment == "naavit" else 0)) * c.embed_dim * width
    # Scores and what softmax makes of them, forward and backward: three and a half times their size, as compiled.
    scores = (
        3.5 * 4 * rows * c.num_heads / tensor * asking * (s.text_length + visual) if c.attention_impl == "xla" else 0
    )
    layer = scores + 4 * rows * asking * c.mlp_dim / tensor * width + 3 * rows * visual * c.embed_dim * width
    kept = c.num_layers * (carried if c.remat_policy != "none" else layer)
    logits = 3 * 4 * rows * min(loss_chunk or s.text_length, s.text_length) * c.padded_vocab_size / tensor
    return device_bytes(state) + gradients + kept + max(layer, logits)
