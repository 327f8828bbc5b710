"""A plan in words: one table for a stage, one column for each program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from saisa_jax.chips import GIB
from saisa_jax.planning.compile import Program
from saisa_jax.planning.lengths import Length
from saisa_jax.planning.roofline import Roofline, mfu, roofline, seconds_at

HOUR = 3600
WIDE = 140  # columns where there is no terminal: tables in a file are not folded


def console() -> Console:
    """Where plans are printed."""
    shown = Console()
    return shown if shown.is_terminal else Console(width=WIDE)


@dataclass(frozen=True)
class Plan:
    """A compiled stage, and how much of it there is."""

    program: Program
    length: Length
    hfu: float

    @property
    def roofline(self) -> Roofline:
        return roofline(self.program)

    @property
    def step_seconds(self) -> float:
        """At the assumed HFU, or the roofline if that is slower."""
        return max(self.roofline.seconds, seconds_at(self.program, self.hfu))

    @property
    def hours(self) -> float:
        return self.length.steps * self.step_seconds / HOUR

    @property
    def chip_hours(self) -> float:
        return self.hours * self.program.topology.chips


def verdict(program: Program) -> str:
    """Whether it fits, in a sentence."""
    topology, name = program.topology, program.prepared.name
    room = topology.chip.hbm / topology.chip.devices / GIB
    if program.memory is None:
        return f"{name} does not fit {topology.name}: {program.refused}"
    peak = program.memory.peak / GIB
    if program.fits:
        return f"{name} fits {topology.name}: {peak:.2f} of {room:.2f} GiB per device at the peak of a step"
    return f"{name} does not fit {topology.name}: it needs {peak:.2f} GiB per device, which has {room:.2f}"


def table(plans: Sequence[Plan]) -> Table:
    """Programs side by side. The first one is the recipe's; changes of the others are relative to it."""
    first = plans[0].program
    mesh = " x ".join(f"{axis} {size}" for axis, size in first.prepared.mesh.shape.items())
    shown = Table(title=f"{first.prepared.name} on {first.topology.name} ({mesh})", title_justify="left")
    shown.add_column("")
    for plan in plans:
        shown.add_column(plan.program.prepared.model.alignment, justify="right", no_wrap=True)
    for section in (_batch, _memory, _work, _time):
        rows = [section(plan) for plan in plans]
        for name in rows[0]:
            shown.add_row(name, *(row.get(name, "") for row in rows))
        shown.add_section()
    return shown


def _batch(plan: Plan) -> dict[str, str]:
    s, model = plan.program.settings, plan.program.prepared.model
    visual = s.batch_size * s.max_images * model.num_visual_tokens
    return {
        "rows of a step": f"{s.batch_size} in {s.accumulation} part(s)",
        "attention, remat policy": f"{model.attention_impl}, {model.remat_policy}",
        "samples of a step, on average": f"{plan.length.samples_per_step:.0f}",
        "image slots of a step": f"{s.batch_size * s.max_images:,}",
        "text tokens of a step, padding too": f"{s.batch_size * s.text_length:,}",
        "visual tokens of a step": f"{visual:,}",
        "steps": f"{plan.length.steps:,}",
    }


def _memory(plan: Plan) -> dict[str, str]:
    memory = plan.program.memory
    if memory is None:
        return {"peak, GiB a device": "too large"}
    parts = {
        "arguments (state and batch), GiB a device": memory.arguments,
        "outputs": memory.outputs,
        "of which in the arguments' place": memory.aliased,
        "temporaries": memory.temporaries,
        "peak, GiB a device": memory.peak,
    }
    return {name: f"{size / GIB:.2f}" for name, size in parts.items()}


def _work(plan: Plan) -> dict[str, str]:
    program = plan.program
    received = {
        f"{kind}: GiB a device receives (times)": f"{traffic.bytes / GIB:.2f} ({traffic.count:,})"
        for kind, traffic in sorted(program.traffic.items())
    }
    return {
        "of attention's pairs legal, computed": f"{program.attention.legal:.1%}, {program.attention.visited:.1%}",
        "TFLOPs of a step, needed": f"{program.model_flops / 1e12:,.0f}",
        "TFLOPs of a step, executed": f"{program.hardware_flops / 1e12:,.0f}",
        **received,
    }


def _time(plan: Plan) -> dict[str, str]:
    line, settings = plan.roofline, plan.program.settings
    visual = settings.batch_size * settings.max_images * plan.program.prepared.model.num_visual_tokens
    text = settings.batch_size * settings.text_length
    rows = {
        "arithmetic at peak, s": f"{line.compute:.3f}",
        "memory, s": f"{line.memory:.3f}",
        "links, s": f"{line.links:.3f}" if plan.program.traffic else "unknown",
        "roofline, s (bound by)": f"{line.seconds:.3f} ({line.bound})",
        f"at {plan.hfu:.0%} HFU, s": f"{plan.step_seconds:.3f}",
        "MFU at that": f"{mfu(plan.program, plan.step_seconds):.1%}",
        "text tokens/s": f"{text / plan.step_seconds:,.0f}",
        "visual tokens/s": f"{visual / plan.step_seconds:,.0f}",
        "hours": f"{plan.hours:,.1f}",
        "chip-hours": f"{plan.chip_hours:,.0f}",
        "chip-hours at the roofline": (f"{plan.length.steps * line.seconds * plan.program.topology.chips / HOUR:,.0f}"),
    }
    return rows
