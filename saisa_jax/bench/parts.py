"""`python -m saisa_jax bench parts`: each part of a program against the least time that this machine could take for it.

The floor of a part is the larger of its FLOPs over the machine's peak, and the bytes of its weights, each read once,
over the machine's bandwidth; both peaks are measured first (`times.py`). Its time comes from JAX's profiler: the
operations of the compiled program, each in the part that the names of its modules say (`saisa_jax/flops.py`).
What is left of the program's time, operations between parts and waiting, is overhead.
"""

from __future__ import annotations

import collections
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from saisa_jax import flops
from saisa_jax.bench.sizes import Size, features_of, make_config, rows_of
from saisa_jax.bench.tables import Grid
from saisa_jax.bench.times import Machine, Timed, Watch, cores
from saisa_jax.models.saisa import Saisa, init_params
from saisa_jax.training.loss import cross_entropy

PROGRAMS = ("prefill", "decode", "gradient")
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*op_name=\"([^\"]*)\"", re.MULTILINE)


class Part(NamedTuple):
    """FLOPs, bytes of weights, and seconds of the device's threads together."""

    flops: float
    bytes: float
    seconds: float

    def floor(self, machine: Machine) -> float:
        """Seconds that it needs at least."""
        return max(self.flops / machine.flops, self.bytes / machine.bandwidth)


class Taken(NamedTuple):
    """A program, part by part."""

    name: str
    alignment: str
    parts: dict[str, Part]
    timed: Timed
    watch: Watch


def bench(size: Size, alignment: str, programs: Any, rows: int, dtype: str, repeat: int) -> Iterator[Taken]:
    """Measures each of PROGRAMS that is asked for."""
    model = make_config(size, alignment, rows, dtype).model_for("finetune")
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), init_params(model, jax.random.key(0)))
    batch = {name: jnp.asarray(x) for name, x in rows_of(size, model, rows).items() if name != "images"}
    features = jnp.asarray(features_of(size, rows), dtype)
    apply = Saisa(model).apply

    def prefill(params: Any, batch: Any, features: Any) -> Any:
        return apply({"params": params}, batch, 1, features, method=Saisa.prefill)

    def decode(params: Any, batch: Any, cache: Any) -> Any:
        at = jnp.max(batch["positions"], axis=1) + 1
        return apply({"params": params}, batch["tokens"][:, 0], at, cache, method=Saisa.decode)[0]

    def gradient(params: Any, batch: Any, features: Any) -> Any:
        def loss(params: Any) -> Any:
            logits, _ = apply({"params": params}, batch, features)
            return cross_entropy(logits, batch["targets"], batch["loss_weights"])[0]

        return jax.grad(loss)(params)

    for name in programs:
        third = jax.jit(prefill)(params, batch, features)[1] if name == "decode" else features
        function = {"prefill": prefill, "decode": decode, "gradient": gradient}[name]
        arguments = params, batch, third
        compiled = jax.jit(function).lower(*arguments).compile()
        needs = flops.by_part(flops.products(jax.make_jaxpr(function)(*arguments).jaxpr)).parts
        weights = weight_bytes(params, dtype)
        timed, watch = Timed(), Watch()
        call = lambda compiled=compiled, arguments=arguments: compiled(*arguments)  # noqa: E731
        for number in range(repeat + 1):
            (timed if number else Timed()).add(call)
        watch.stop()
        took = profiled(call, compiled.as_text() or "", repeat)
        names = [part for part in (*needs, "rest") if needs.get(part) or took.get(part)]
        parts = {part: Part(needs.get(part, 0.0), weights.get(part, 0.0), took.get(part, 0.0)) for part in names}
        yield Taken(name, alignment, parts, timed, watch)


def weight_bytes(params: Any, dtype: str) -> dict[str, float]:
    """Of each part's parameters; of a table of embeddings that is no head nearly nothing is read."""
    found: dict[str, float] = collections.defaultdict(float)
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    for path, leaf in flat.items():
        part = flops.part_of(path.replace("lm_head", "Saisa.head"))
        if "embed_tokens" in path and "lm_head" not in params:
            part = "head"
        found[part] += leaf.size * np.dtype(jnp.dtype(dtype)).itemsize
    return dict(found)


def profiled(call: Any, program: str, repeat: int) -> dict[str, float]:
    """Seconds a call by part, of all threads together, from a trace of `repeat` calls.

    Args:
      call: runs the program.
      program: its text, whose operations say which modules they come from.
      repeat: calls.
    """
    part_of = {name: flops.part_of(scope) for name, scope in _OPERATION.findall(program)}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeat):
                jax.block_until_ready(call())
        file = next(Path(folder).rglob("*.xplane.pb"))
        data = jax.profiler.ProfileData.from_file(str(file))
        found: dict[str, float] = collections.defaultdict(float)
        for plane in data.planes:
            for line in plane.lines:
                for event in line.events:
                    operation = dict(event.stats).get("hlo_op")
                    if operation is None or str(operation).startswith(("while", "call", "conditional")):
                        continue  # whose bodies are events of their own
                    part = part_of.get(str(operation), "other")
                    found["rest" if part == "other" else part] += event.duration_ns / 1e9 / repeat
    return dict(found)


def grid(taken: Taken, machine: Machine) -> Grid:
    """A line for each part, then all of it."""
    shown = Grid(
        f"{taken.name}, {taken.alignment}", "part", "GFLOPs", "weights, MB", "floor, ms", "ms", "floor's share"
    )
    floors = 0.0
    for name, part in taken.parts.items():
        floor = part.floor(machine)
        floors += floor
        share = f"{floor / part.seconds:.0%}" if part.seconds and floor else ""
        figures = f"{part.flops / 1e9:,.2f}", f"{part.bytes / 1e6:,.1f}", f"{1e3 * floor:,.2f}"
        shown.add(name, *figures, f"{1e3 * part.seconds:,.2f}", share)
    whole, named = taken.timed.median, sum(part.seconds for part in taken.parts.values())
    shown.add("between operations", "", "", "", f"{1e3 * max(0.0, whole - named):,.2f}", "")
    total = f"{sum(p.flops for p in taken.parts.values()) / 1e9:,.2f}"
    shown.add("all", total, "", f"{1e3 * floors:,.2f}", f"{1e3 * whole:,.2f}", f"{floors / whole:.0%}")
    processor = taken.timed.processor_median / cores()
    shown.add("all, by processor time", "", "", "", f"{1e3 * processor:,.2f}", f"{floors / processor:.0%}")
    return shown


def record(taken: Taken, machine: Machine) -> Mapping[str, Any]:
    """All of it, for a JSON file."""
    return {
        "program": taken.name,
        "alignment": taken.alignment,
        "machine": machine._asdict(),
        **taken.watch.says(),
        "seconds": taken.timed.seconds,
        "processor": taken.timed.processor,
        "parts": {name: part._asdict() | {"floor": part.floor(machine)} for name, part in taken.parts.items()},
    }
