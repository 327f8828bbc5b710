"""What `bench peers` says: a table for each measure, the bars, a file of all figures, a picture."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from saisa_jax.bench.peers import OURS, Case, Found
from saisa_jax.bench.tables import Grid
from saisa_jax.bench.times import Machine, Timed, cores, middle, ratios, why_busy
from saisa_jax.report.plots.style import COLORS, drawn
from saisa_jax.report.runs import NAMES

EAGER, AUTHORS = "PyTorch", "the authors' way"
BUSY = "busy"
AT = Case("mid", 1, "float32")  # where the bars stand, on CPUs


class Share(NamedTuple):
    """By wall time and by processor time."""

    wall: float
    processor: float

    @classmethod
    def of(cls, one: Timed, other: Timed) -> Share:
        """One's time of another's, round by round where both took turns."""
        pairs = (one.seconds, other.seconds), (one.processor, other.processor)
        return cls(*(statistics.median(ratios(*pair)) for pair in pairs))

    def __str__(self) -> str:
        return f"{self.wall:.2f} / {self.processor:.2f}"


class Bar(NamedTuple):
    """What should hold, and what was found."""

    what: str
    found: Share
    limit: float
    least: bool = False  # the limit is what there should be at least

    def met(self, by: str) -> bool:
        value = getattr(self.found, by)
        return value >= self.limit if self.least else value <= self.limit


def name_of(program: str) -> tuple[str, str]:
    """(alignment, program) of a key of `Found.timed`."""
    alignment, _, program = program.partition(", ")
    return alignment, program


def grid(found: Found, machine: Machine) -> Grid:
    """The programs of one measure."""
    size, rows, dtype = found.case
    busy = why_busy(machine, [found.watch])
    mark = f" ({BUSY})" if busy else ""
    unit = "a token of " if found.measure == "decode" else ""
    shown = Grid(
        f"{found.measure}: {size}, {unit}{rows} row(s), {dtype}{mark}",
        "", "ms", "spread", "CPU ms", "of PyTorch", "of LLaVA", "of peak", "differs by",
    )  # fmt: skip
    for key, timed in found.timed.items():
        alignment, program = name_of(key)
        eager, llava = found.timed.get(f"{alignment}, {EAGER}"), found.timed.get(f"llava, {OURS}")
        shown.add(
            f"{NAMES[alignment]}, {program}",
            f"{1e3 * timed.median:,.1f}",
            f"{timed.spread:.0%}",
            f"{1e3 * timed.processor_median:,.1f}",
            str(Share.of(timed, eager)) if eager and eager is not timed else "",
            str(Share.of(timed, llava)) if llava and program == OURS and llava is not timed else "",
            f"{timed.flops / timed.median / machine.flops:.0%}",
            f"{found.differences[key]:.0e}" if program != OURS else "",
        )
    return shown


def bars(found: Sequence[Found], machine: Machine) -> Iterator[Bar]:
    """What should hold on CPUs: nearly all at one size, and SAISA's share of LLaVA's FLOPs at every size."""
    by_case: dict[Case, dict[str, dict[str, Timed]]] = {}
    for one in found:
        by_case.setdefault(one.case, {})[one.measure] = one.timed
    for case, measures in by_case.items():
        prefill = measures.get("prefill", {})
        if (saisa := prefill.get(f"saisa, {OURS}")) and (llava := prefill.get(f"llava, {OURS}")):
            needs = saisa.flops / llava.flops
            at = f"{case.size}, {case.rows} row(s), {case.dtype}"
            yield Bar(f"SAISA's prefill of LLaVA's, {at} (FLOPs: {needs:.2f})", Share.of(saisa, llava), 1.05 * needs)
    measures = by_case.get(AT, {})
    prefill, second = measures.get("prefill", {}), measures.get("second", {})
    for measure, alignment, other, limit in (
        ("prefill", "saisa", AUTHORS, 0.50),
        ("prefill", "saisa", EAGER, 0.60),
        ("prefill", "llava", EAGER, 1.00),
        ("decode", "saisa", EAGER, 0.90),
        ("decode", "llava", EAGER, 0.90),
        ("train", "saisa", EAGER, 1.00),
        ("train", "llava", EAGER, 1.00),
    ):
        timed = measures.get(measure, {})
        if (ours := timed.get(f"{alignment}, {OURS}")) and (theirs := timed.get(f"{alignment}, {other}")):
            yield Bar(f"{NAMES[alignment]}'s {measure} of {other}", Share.of(ours, theirs), limit)
    if (asked := second.get(f"saisa, {OURS}")) and (first := prefill.get(f"saisa, {OURS}")):
        yield Bar("SAISA's second question of its first", Share.of(asked, first), 0.35)
    for measure in ("prefill", "train"):
        for key, timed in measures.get(measure, {}).items():
            if name_of(key)[1] == OURS:
                reached = [timed.flops / machine.flops / seconds for seconds in
                           (timed.median, timed.processor_median / cores())]  # fmt: skip
                yield Bar(f"{NAMES[name_of(key)[0]]}'s {measure}, of the matmul peak", Share(*reached), 0.75, True)


def bars_grid(found: Sequence[Found], machine: Machine) -> Grid | None:
    """The bars; None if there are none here."""
    shown = Grid("The bars", "", "wall / CPU", "bar", "by wall time", "by CPU time")
    for bar in bars(found, machine):
        said = ["met" if bar.met(by) else "missed" for by in ("wall", "processor")]
        shown.add(bar.what, str(bar.found), f"{'at least' if bar.least else 'at most'} {bar.limit:.2f}", *said)
    return shown if shown.rows else None


def describe(machine: Machine, dtype: str) -> str:
    """The machine and its peaks, in a line."""
    device = jax.devices()[0].device_kind
    return (
        f"{device}, {cores()} cores ({_processor()}); {dtype}: products of large matrices {machine.flops / 1e9:,.0f} "
        f"GFLOP/s, memory {machine.bandwidth / 1e9:,.1f} GB/s"
    )


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def record(found: Sequence[Found], machines: dict[str, Machine], versions: dict[str, str]) -> dict[str, Any]:
    """All of it, for a JSON file."""
    return {
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": cores(),
        "cores_of_machine": os.cpu_count(),
        "versions": versions,
        "peaks": {dtype: machine._asdict() for dtype, machine in machines.items()},
        "found": [
            {
                **one.case._asdict(),
                "measure": one.measure,
                **one.watch.says(),
                "busy": why_busy(machines[one.case.dtype], [one.watch]),
                "programs": {
                    name: {
                        "flops": timed.flops,
                        "seconds": timed.seconds,
                        "processor": timed.processor,
                        "difference": one.differences[name],
                    }
                    for name, timed in one.timed.items()
                },
            }
            for one in found
        ],
    }


@drawn
def figure(found: Sequence[Found], busy: bool) -> Figure:
    """Milliseconds of every program, a panel for each measure of a case; a line spans the middle half of the rounds."""
    columns = min(4, len(found))
    lines = -(-len(found) // columns)
    drawn = Figure(figsize=(3.3 * columns, 2.9 * lines), layout="constrained")
    for number, one in enumerate(found, start=1):
        axes = drawn.add_subplot(lines, columns, number)
        names = list(one.timed)
        for at, name in enumerate(names):
            alignment, program = name_of(name)
            color = COLORS[0 if alignment == "saisa" else 1]
            timed, alpha = one.timed[name], 1.0 if program == OURS else 0.45
            axes.barh(at, 1e3 * timed.median, color=color, alpha=alpha, height=0.68)
            low, high = (1e3 * value for value in middle(timed.seconds))
            axes.plot([low, high], [at, at], color="#222222", linewidth=1.1)
            axes.text(high, at, f" {1e3 * timed.median:,.0f}", va="center", fontsize=8)
        axes.set_yticks(np.arange(len(names)), [f"{NAMES[a]}, {p}" for a, p in map(name_of, names)], fontsize=7.5)
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.grid(axis="y", visible=False)
        size, rows, dtype = one.case
        axes.set_title(f"{one.measure}\n{size}, {rows} row(s), {dtype}", fontsize=9)
        axes.set_xlabel("ms" + (", while the machine was busy" if busy else ""))
    return drawn
