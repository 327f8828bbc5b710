"""From bytes and FLOPs to seconds, hours and chip-hours.

A step cannot be faster than each of its chip's parts: arithmetic at the peak rate, the memory's bandwidth, the links'
bandwidth. The roofline is the slowest of the three, as if the others hid behind it. Real steps reach a part of it, so
that hours are given at an assumed HFU (hardware FLOPs utilisation: executed FLOPs / time / peak) as well. What of it is
useful is the MFU (model FLOPs utilisation): needed FLOPs, of attention those of legal pairs, without recomputation.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

from saisa_jax.planning.compile import Program
from saisa_jax.planning.traffic import BETWEEN_SLICES
from saisa_jax.training.memory import device_bytes, traffic_bytes


@dataclass(frozen=True)
class Roofline:
    """Seconds that each part of a chip needs for one step."""

    compute: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.links)

    @property
    def bound(self) -> str:
        parts = {"arithmetic": self.compute, "memory": self.memory, "links": self.links}
        return max(parts, key=parts.__getitem__)


def roofline(program: Program) -> Roofline:
    """The least time of a step.

    What goes between slices takes no time here: how fast their network is depends on where they stand.
    """
    chip, chips = program.topology.chip, program.topology.chips
    received = sum(kind.bytes for name, kind in program.traffic.items() if name != BETWEEN_SLICES) * chip.devices
    return Roofline(
        compute=program.hardware_flops / chips / chip.flops,
        memory=memory_traffic(program) * chip.devices / chip.hbm_bandwidth,
        links=received / chip.link_bandwidth,
    )


def memory_traffic(program: Program) -> float:
    """Bytes that a device's memory moves at least: the state is read and written once in a step; every forward,
    recomputed and backward pass writes all weights, gathered in the dtype of the activations; and products read and
    write their operands and results (`traffic_bytes`).
    """
    prepared = program.prepared
    state = prepared.abstract_state()
    shards = device_bytes((state.trainable, state.opt_state))
    weights = sum(leaf.size for leaf in jax.tree.leaves((state.trainable, state.frozen)))
    gathered = weights * jax.numpy.dtype(prepared.model.dtype).itemsize / prepared.mesh.shape["tensor"]
    passes = 2 if prepared.model.remat_policy == "none" else 3
    of_stage = prepared.model, prepared.settings, prepared.mesh, program.loss_chunk, prepared.teacher
    activations = traffic_bytes(*of_stage)
    if prepared.teacher:  # whose forward pass reads all of its weights once
        passes += 1
    return 2 * shards + passes * prepared.settings.accumulation * gathered + activations


def seconds_at(program: Program, hfu: float) -> float:
    """Of a step, if that share of the peak goes into FLOPs that are executed."""
    return program.hardware_flops / program.topology.chips / program.topology.chip.flops / hfu


def mfu(program: Program, seconds: float) -> float:
    """Model FLOPs utilisation (0..1) of a step that takes so long."""
    return program.model_flops / program.topology.chips / program.topology.chip.flops / seconds
