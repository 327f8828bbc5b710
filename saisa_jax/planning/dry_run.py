"""`python train.py --dry_run`: what a run would be. Nothing is read, nothing runs, no accelerator is needed.

python train.py --dry_run --config=configs/saisa_vicuna_7b.py:finetune --topology=v5e:4x4
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import jax
from flax import traverse_util
from rich.table import Table

from saisa_jax import flops
from saisa_jax.config import STAGES, Config, ConfigError, to_dict
from saisa_jax.planning import tables, topologies
from saisa_jax.planning.lengths import Length, length
from saisa_jax.planning.stage import plan_stage
from saisa_jax.training.memory import device_bytes
from saisa_jax.training.optimizer import flatten, merge
from saisa_jax.training.setup import StageSetup, setup_stage

NUMBERS = ("per device", "forward", "backward", "share")  # columns to the right


def run(config: Config, topology: str | None = None) -> int:
    """Prints configuration, parameters, batch, bytes and FLOPs of every stage; with a topology compiles its step, too.

    Args:
      config: the run's.
      topology: what the mesh is made of, such as v5e:4x4; None: the devices that there are.

    Returns:
      1 if a stage does not fit the topology, else 0.

    Raises:
      ConfigError: a mesh that does not suit the devices, with the flags that mend it; an unknown topology.
    """
    slice_ = topologies.parse(topology) if topology else None
    stages = {stage: (_length(config, stage), _prepare(config, stage, slice_)) for stage in config.stages}
    console = tables.console()
    for name, value in resolved(config).items():
        console.print(f"{name} = {json.dumps(value)}", highlight=False, markup=False, soft_wrap=True)
    fits = True
    for stage, (known, prepared) in stages.items():
        console.print()
        console.print(heading(prepared, known, topology, config.data.packing), highlight=False, soft_wrap=True)
        for table in (parameters(prepared), batch(prepared), memory(prepared), work(prepared)):
            console.print(table)
        if slice_:
            fits &= plan_stage(console, config, stage, slice_, known or Length(prepared.settings.batch_size, 1))
    if not slice_:
        said = "What activations take is in no table: with --topology=v5e:4x4 or the like the step is compiled."
        console.print(said, highlight=False, soft_wrap=True)
    return 0 if fits else 1


def resolved(config: Config) -> dict[str, Any]:
    """Every field that counts in this run by its name as a flag, as {"finetune.optimizer.lr": 2e-5}."""
    fields = traverse_util.flatten_dict(to_dict(config), sep=".")
    idle = tuple(f"{stage}." for stage in STAGES if stage not in config.stages)
    return {name: value for name, value in fields.items() if not name.startswith(idle)}


def _length(config: Config, stage: str) -> Length | None:
    """None: unknown without the data."""
    try:
        return length(config.stage(stage), config.data.packing, config.model.vision)
    except ConfigError:
        return None


def _prepare(config: Config, stage: str, topology: topologies.Topology | None) -> StageSetup:
    steps = config.stage(stage).steps or 1  # of the schedule, which no shape depends on
    if topology:
        jax.config.update("jax_platforms", "cpu")  # nothing runs; leave accelerators alone
        return setup_stage(config, stage, steps, topologies.devices(topology))
    try:
        return setup_stage(config, stage, steps)
    except ConfigError as error:
        raise ConfigError(
            f"{error}. These are the devices of this machine; name those of the run with --topology=v5e:4x4 or the like"
        ) from error


def heading(prepared: StageSetup, known: Length | None, topology: str | None, packing: bool) -> str:
    """Stage, mesh and steps in a line."""
    mesh, devices, rows = prepared.mesh, prepared.mesh.devices, prepared.settings.batch_size
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    where = f"{prepared.name} on {topology or f'{devices.size} x {devices.flat[0].device_kind}'} ({shape})"
    if known is None:
        return f"{where}: {rows} rows a step; how many steps is unknown without the data"
    samples = f"about {known.samples_per_step:.0f} samples, as far as their lengths are known without the data"
    if packing and known.samples_per_step == rows:  # how many share a row is unknown
        samples = f"{rows} samples or more"
    return f"{where}: {known.steps:,} steps, {rows} rows a step, which hold {samples}"


# --- Tables ----------------------------------------------------------------------------------------------------------


def parameters(prepared: StageSetup) -> Table:
    """Each parameter, the row of `groups` that takes it, and where it lies."""
    state, groups = prepared.abstract_state(), prepared.settings.groups
    table = _table(f"{prepared.name}: parameters", "parameter", "group", "shape", "dtype", "split over", "per device")
    params = flatten(merge(state.trainable, state.frozen))
    for path, leaf in sorted(params.items()):
        pattern, group = next((pattern, group) for pattern, group in groups if re.fullmatch(pattern, path))
        how = "frozen" if group.frozen else f"lr x {group.lr_scale:g}"
        table.add_row(path, f"{pattern} ({how})", *_of_array(leaf))
    for path, leaf in sorted(flatten(state.teacher or {}).items()):
        table.add_row(f"teacher/{path}", "the teacher's own", *_of_array(leaf))
    sizes = [math.prod(leaf.shape) for leaf in params.values()]
    table.add_section()
    table.add_row(f"{sum(sizes):,} in all", "", "", "", "", _bytes(params))
    return table


def batch(prepared: StageSetup) -> Table:
    """The arrays of a global batch, and how they are split."""
    table = _table(f"{prepared.name}: a batch", "array", "shape", "dtype", "split over", "per device")
    for name, leaf in prepared.abstract_batch().items():
        table.add_row(name, *_of_array(leaf))
    return table


def memory(prepared: StageSetup) -> Table:
    """Bytes of one device: what is there between steps, and the gradients that each step needs beside it."""
    state = prepared.abstract_state()
    parts = {
        "parameters that train": state.trainable,
        "parameters that are frozen": state.frozen,
        **({"the teacher's own": state.teacher} if state.teacher else {}),
        "moments": state.opt_state,
        "batch": prepared.abstract_batch(),
    }
    wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float32", sharding=x.sharding), state.trainable)
    table = _table(f"{prepared.name}: memory", "", "per device")
    for name, tree in {**parts, "all of these": parts, "gradients, within a step": wide}.items():
        table.add_row(name, _bytes(tree))
    return table


def work(prepared: StageSetup) -> Table:
    """FLOPs of a step by part, over all devices; what is recomputed (remat) is not in them."""
    s = prepared.settings
    of_step = s.groups, s.batch_size, s.text_length, s.max_images, prepared.teacher
    forward, backward, teacher = training = flops.training(prepared.model, *of_step)
    total = training.total
    unit, name = (1e12, "TFLOPs") if total > 1e12 else (1e6, "MFLOPs")
    table = _table(f"{prepared.name}: {name} of a step", "part", "forward", "backward", "share")
    rows = [(part, forward.parts[part], backward.parts[part]) for part in flops.PARTS]
    if prepared.teacher:
        rows.append(("teacher", teacher.total, 0))
    for part, ahead, back in [*rows, ("all", forward.total + teacher.total, backward.total)]:
        table.add_row(part, f"{ahead / unit:,.3f}", f"{back / unit:,.3f}", f"{(ahead + back) / total:.1%}")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column in NUMBERS else "left", overflow="fold")
    return table


def _of_array(leaf: Any) -> tuple[str, str, str, str]:
    """Shape, dtype, axes of the mesh by dimension ("-": whole), bytes of one device."""
    axes = [*leaf.sharding.spec, *[None] * (leaf.ndim - len(leaf.sharding.spec))]
    sizes = leaf.sharding.mesh.shape
    names = ["+".join(axis for axis in jax.tree.leaves(part) if sizes[axis] > 1) for part in axes]
    shape = " x ".join(map(str, leaf.shape))
    return shape, str(leaf.dtype), ", ".join(name or "-" for name in names), _bytes(leaf)


def _bytes(tree: Any) -> str:
    size = device_bytes(tree)
    unit, name = next(
        (unit, name) for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if size >= unit or name == "KiB"
    )
    return f"{size / unit:,.2f} {name}"
