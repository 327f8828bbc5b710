"""From bytes and FLOPs to seconds, hours and chip-hours.

A step cannot be faster than each of its chip's parts: arithmetic at the peak rate, the memory's bandwidth, the links'
bandwidth. The roofline is the slowest of the three, as if the others hid behind it. Real steps reach a part of it, so
that hours are given at an assumed MFU (model FLOPs utilisation: needed FLOPs / time / peak) as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import PurePath

import jax

from saisa_jax.config import ConfigError, StageConfig
from saisa_jax.planning.compile import Program


@dataclass(frozen=True)
class Dataset:
    """Samples of the paper's data, and what one holds on average: text tokens, template included, and images."""

    samples: int
    text: float
    images: float


# Samples as LLaVA publishes them; lengths are estimates, from the parts that the data are mixed of.
DATASETS = {
    "blip_laion_cc_sbu_558k.json": Dataset(558_128, 25, 1.0),
    "llava_v1_5_mix665k.json": Dataset(665_298, 356, 0.94),
}
FILLED = 0.94  # of a packed row's scarcest room


@dataclass(frozen=True)
class Length:
    """How long a stage is: samples of one step, on average, and steps."""

    samples_per_step: float
    steps: int


def length(settings: StageConfig, packing: bool, samples: int | None = None, per_row: float | None = None) -> Length:
    """How long a stage takes, as far as it is known without its data.

    Args:
      settings: the stage's.
      packing: whether rows hold several samples.
      samples: of its sources; None: of those that are in DATASETS.
      per_row: samples of a row; None: what its T and M have room for, on average.

    Raises:
      ConfigError: nobody says how many samples there are.
    """
    names = [PurePath(source.path).name for source in settings.sources]
    known = [DATASETS[name] for name in names if name in DATASETS]
    total = sum(data.samples for data in known)
    if settings.steps is None and samples is None and len(known) < len(names):
        raise ConfigError(f"nobody knows how many samples {', '.join(map(str, settings.sources))} hold: set --samples")
    if per_row is None and packing and known:
        text = sum(data.text * data.samples for data in known) / total
        images = sum(data.images * data.samples for data in known) / total
        per_row = FILLED * min(settings.text_length / text, settings.max_images / images)
    per_step = settings.batch_size * max(1.0, per_row or 1.0)
    steps = math.floor(settings.epochs * (total if samples is None else samples) / per_step)
    return Length(per_step, settings.steps or max(1, steps))


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
    """The least time of a step; memory traffic is that of the state alone (see `state_traffic`)."""
    chip, chips = program.topology.chip, program.topology.chips
    received = sum(kind.bytes for kind in program.traffic.values()) * chip.devices
    return Roofline(
        compute=program.counted_flops / chips / chip.flops,
        memory=state_traffic(program) * chip.devices / chip.hbm_bandwidth,
        links=received / chip.link_bandwidth,
    )


def state_traffic(program: Program) -> float:
    """Bytes that a device's memory moves at least: the state is read and written once in a step, and every forward,
    recomputed and backward pass reads all weights, gathered in the dtype of the activations, after writing them.
    """
    prepared = program.prepared
    state = prepared.abstract_state()
    shards = sum(_shard_bytes(leaf) for leaf in jax.tree.leaves((state.trainable, state.opt_state)))
    weights = sum(leaf.size for leaf in jax.tree.leaves((state.trainable, state.frozen)))
    gathered = weights * jax.numpy.dtype(prepared.model.dtype).itemsize / prepared.mesh.shape["tensor"]
    passes = 2 if prepared.model.remat_policy == "none" else 3
    return 2 * shards + 2 * passes * prepared.settings.accumulation * gathered


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> float:
    assert leaf.sharding is not None
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def seconds_at(program: Program, mfu: float) -> float:
    """Of a step, if that share of the peak goes into FLOPs that are needed (recomputed ones are not)."""
    return program.formula_flops / program.topology.chips / program.topology.chip.flops / mfu
