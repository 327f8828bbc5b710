"""Asking a model on accelerators that are not here: the programs of an evaluation, compiled with nothing but shapes."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from saisa_jax import flops, parallel
from saisa_jax.batch import empty_batch
from saisa_jax.chips import GIB
from saisa_jax.config import Config
from saisa_jax.inference.generate import Generator, bucket
from saisa_jax.inference.memory import Room, Shape, picture_bytes, room
from saisa_jax.inference.programs import Programs
from saisa_jax.models.saisa import abstract_params
from saisa_jax.planning.compile import GPU_OPTIONS, Memory, compiled
from saisa_jax.planning.topologies import Topology, devices
from saisa_jax.planning.traffic import Traffic, traffic
from saisa_jax.training.memory import device_bytes

PICTURES_AT_ONCE = 4  # of a way, in the program that encodes


@dataclass(frozen=True)
class Asked:
    """One compiled program.

    Attributes:
      memory: of one device; None: it does not fit, and `refused` is what the compiler said.
      flops: in the program, over all devices; a loop over new tokens counts once.
      traffic: per device, by kind of collective; a loop counts once.
      seconds: that lowering and compiling took.
    """

    name: str
    memory: Memory | None
    refused: str
    flops: float
    traffic: dict[str, Traffic]
    seconds: float


@dataclass(frozen=True)
class GenerationPlan:
    """The programs that answer batches on a topology.

    Attributes:
      ways: devices over which rows are split.
      room: rows of a way, and what is kept of pictures.
      parameters: bytes of them on a device.
      picture_bytes: of a picture on a device.
      pictures: that a way keeps.
    """

    topology: Topology
    ways: int
    shape: Shape
    room: Room
    parameters: int
    picture_bytes: int
    pictures: int
    programs: list[Asked]

    @property
    def device_memory(self) -> float:
        return self.topology.chip.hbm / self.topology.chip.devices

    @property
    def fits(self) -> bool:
        return all(each.memory is not None and each.memory.peak <= self.device_memory for each in self.programs)


def compile_generation(
    config: Config, topology: Topology, shape: Shape, dtype: str = "bfloat16", batch_size: int | None = None
) -> GenerationPlan:
    """Compiles what `eval.py` runs with the finished model of a recipe: a way's pictures, and a batch of answers.

    Args:
      shape: text tokens, new tokens and pictures of a row.
      dtype: of parameters and activations.
      batch_size: questions at once, over all devices; None: as many as the memory has room for.

    Raises:
      ConfigError: no compiler for the topology, or a mesh that does not suit it.
    """
    model = dataclasses.replace(config.model_for(config.stages[-1]), dtype=dtype, param_dtype=dtype)
    mesh = parallel.make_mesh(config.mesh, devices(topology))
    model = dataclasses.replace(model, attention_impl=parallel.attention_of(model, mesh))
    rules = parallel.make_rules(model, mesh)
    places = parallel.shardings_of(abstract_params(model, boxed=True), mesh, rules)
    params = jax.tree.map(_placed, abstract_params(model), places)
    shape = Shape(bucket(shape.text), bucket(shape.new), shape.images)
    fits = room(model, mesh, shape, int(topology.chip.hbm / topology.chip.devices) - device_bytes(params))
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    fits = fits if batch_size is None else fits._replace(rows=-(-batch_size // ways))
    # Enough pictures for a batch, and those that are encoded ahead; to keep more needs no other program.
    pictures = fits.rows * shape.images + 2 * PICTURES_AT_ONCE
    programs = Programs(Generator(model, [2]), mesh, ways, shape.new)
    sharding, size, total = parallel.batch_sharding(mesh), model.vision.image_size, ways * fits.rows
    pool = programs.pool(model, params, pictures) if shape.images else None
    of_rows = lambda *shape, dtype="int32": jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)  # noqa: E731
    pixels = of_rows(ways, PICTURES_AT_ONCE, size, size, 3, dtype="uint8")
    batch = empty_batch(total, shape.text, shape.images, 0)
    batch = {name: _placed(x, sharding) for name, x in batch.items() if name != "images"}
    with parallel.use(mesh, rules):
        traced = {
            "prefill and decode": lambda: programs.answer.trace(params, batch, of_rows(total, shape.images), pool)
        }
        if pool is not None:
            encode = lambda: programs.encode.trace(params, pixels, of_rows(ways), pool=pool)  # noqa: E731
            traced = {"encode": encode} | traced
        done = [_compile(name, trace, topology, mesh.size) for name, trace in traced.items()]
    of_one = picture_bytes(model, mesh)
    return GenerationPlan(topology, ways, shape, fits, device_bytes(params), of_one, pictures, done)


def _compile(name: str, trace: Any, topology: Topology, size: int) -> Asked:
    started = time.monotonic()
    traced = trace()
    memory, refused, hlo = compiled(traced.lower(), GPU_OPTIONS if topology.on_gpu else {})
    moved = dict(traffic(hlo, size)) if hlo else {}
    return Asked(name, memory, refused, flops.count(traced.jaxpr.jaxpr), moved, time.monotonic() - started)


def _placed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def plan_generation(
    console: Console, config: Config, topology: Topology, shape: Shape, dtype: str, batch_size: int | None = None
) -> bool:
    """Compiles and prints; whether it fits. The rest is as in `compile_generation`."""
    plan = compile_generation(config, topology, shape, dtype, batch_size)
    name, has = topology.name, plan.device_memory / GIB
    refused = [each for each in plan.programs if each.memory is None]
    peak = max((each.memory.peak for each in plan.programs if each.memory), default=0) / GIB
    if refused:
        console.print(f"asking does not fit {name}: {refused[0].name}: {refused[0].refused}", highlight=False)
    else:
        verb = "fits" if plan.fits else "does not fit"
        console.print(f"asking {verb} {name}: {peak:.2f} of {has:.2f} GiB per device at the peak", highlight=False)
    console.print(table(plan, config, dtype))
    picture = plan.picture_bytes / 2**20
    console.print(
        f"Parameters are {plan.parameters / GIB:.2f} GiB of it in {dtype}, {plan.pictures} pictures of {picture:,.0f} "
        f"MiB lie beside them. eval.py answers {plan.room.rows} questions at once on each of {plan.ways} way(s) and "
        f"keeps up to {plan.room.cache_bytes / GIB:.1f} GiB of pictures on a device, unless --batch_size and "
        "--image_cache_bytes say otherwise.",
        highlight=False,
        soft_wrap=True,
    )
    return plan.fits


def table(plan: GenerationPlan, config: Config, dtype: str) -> Table:
    """A column for each program."""
    what = f"{plan.shape.text} text tokens, {plan.shape.images} image slot(s), up to {plan.shape.new} new tokens a row"
    shown = Table(title=f"{config.name} in {dtype} on {plan.topology.name}: {what}", title_justify="left")
    shown.add_column("GiB a device")
    for each in plan.programs:
        shown.add_column(each.name, justify="right", no_wrap=True)

    def row(name: str, of: Any) -> None:
        shown.add_row(name, *(of(each) for each in plan.programs))

    for name in ("arguments", "outputs", "aliased", "temporaries", "peak"):
        label = {"arguments": "arguments (parameters, pictures, batch)", "aliased": "of which in the arguments' place"}
        size = lambda each, name=name: f"{getattr(each.memory, name) / GIB:.2f}" if each.memory else "-"  # noqa: E731
        row(label.get(name, name), size)
    shown.add_section()
    row("TFLOPs, a new token once", lambda each: f"{each.flops / 1e12:,.2f}")
    for kind in sorted({kind for each in plan.programs for kind in each.traffic}):
        moved = lambda each, kind=kind: f"{each.traffic[kind].bytes / GIB:.2f}" if kind in each.traffic else ""  # noqa: E731
        row(f"{kind}: GiB received", moved)
    return shown
