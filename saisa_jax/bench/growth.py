"""`python -m saisa_jax bench growth`: time and memory of a question as its pictures become finer, and more.

Every alignment reads the same rows, in turns (`times.py`), with features of the pictures handed in. A straight line
through the logarithms of the visual tokens, and of the time beyond that of the text alone, has the exponent of the
growth as its slope: 1 where each visual token costs the same, 2 where each costs as much as there are others.
Memory is what the compiled program says that it takes for its results and on the way, without parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from saisa_jax.batch import Batch
from saisa_jax.bench.sizes import Size, features_of, make_config, rows_of
from saisa_jax.bench.tables import Grid
from saisa_jax.bench.times import Timed, Watch, in_turns
from saisa_jax.models.saisa import Saisa, init_params
from saisa_jax.report.plots.style import COLORS, MARKERS, drawn
from saisa_jax.report.runs import NAMES


class Point(NamedTuple):
    """A question about so many pictures, of so many visual tokens each."""

    images: int
    tokens: int
    timed: dict[str, Timed]  # by alignment
    memory: dict[str, float]  # bytes
    watch: Watch

    @property
    def visual(self) -> int:
        """V, visual tokens of the row."""
        return self.images * self.tokens


def bench(
    size: Size, alignments: Sequence[str], shapes: Sequence[tuple[int, int]], dtype: str, repeat: int
) -> Iterator[Point]:
    """Times prefill of one row, shape by shape.

    Args:
      size: of the decoder, the features and the text.
      alignments: which to compare.
      shapes: (pictures, tokens of each), a square number; the text alone comes before them all.
      dtype: of parameters and activations.
      repeat: rounds of each shape.
    """
    params: dict[str, Any] = {}
    for images, tokens in [(0, size.visual), *shapes]:
        shape = size._replace(images=images, visual=tokens)
        calls, memory, timed = {}, {}, {}
        for alignment in alignments:
            model = make_config(shape._replace(images=max(images, 1)), alignment, 1, dtype).model_for("finetune")
            if alignment not in params:  # they do not depend on how many visual tokens there are
                made = init_params(model, jax.random.key(0))
                params[alignment] = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), made)
            batch = {name: jnp.asarray(x) for name, x in rows_of(shape, model, 1).items() if name != "images"}
            features = jnp.asarray(features_of(shape, 1), dtype)

            def prefill(params: Any, batch: Any, features: Any, model: Any = model) -> Any:
                return Saisa(model).apply({"params": params}, cast(Batch, batch), 1, features, method=Saisa.prefill)

            program = jax.jit(prefill).lower(params[alignment], batch, features).compile()
            taken = program.memory_analysis()
            memory[alignment] = float(taken.temp_size_in_bytes + taken.output_size_in_bytes) if taken else float("nan")
            calls[alignment] = lambda program=program, held=(params[alignment], batch, features): program(*held)
            timed[alignment] = Timed()
        for call in calls.values():
            jax.block_until_ready(call())
        watch = Watch()
        for alignment, call in in_turns(calls, repeat):
            timed[alignment].add(call)
        yield Point(images, tokens, timed, memory, watch.stop())


def seconds_of(timed: Timed) -> float:
    """On a CPU of the processor, which other load hardly changes."""
    return timed.processor_median if jax.default_backend() == "cpu" else timed.median


def exponent(points: Sequence[Point], alignment: str, of: str) -> float:
    """How an alignment's time or memory, beyond that of the text alone, grows with visual tokens.

    Args:
      points: the first of them is the text alone.
      alignment: whose.
      of: time or memory.
    """
    values = [seconds_of(p.timed[alignment]) if of == "time" else p.memory[alignment] for p in points]
    more = [(p.visual, value - values[0]) for p, value in zip(points[1:], values[1:], strict=True) if value > values[0]]
    if len({visual for visual, _ in more}) < 2:
        return float("nan")
    visual, value = np.log(np.asarray(more)).T
    return float(np.polyfit(visual, value, 1)[0])


def grid(points: Sequence[Point]) -> Grid:
    """A line for each shape, and the exponents."""
    alignments = list(points[0].timed)
    header = [f"{NAMES[name]}, {of}" for of in ("ms", "CPU ms", "MB") for name in alignments]
    shown = Grid("Prefill", "pictures x tokens", *header)
    for point in points:
        cells = [f"{1e3 * point.timed[name].median:,.0f}" for name in alignments]
        cells += [f"{1e3 * point.timed[name].processor_median:,.0f}" for name in alignments]
        cells += [f"{point.memory[name] / 1e6:,.0f}" for name in alignments]
        shown.add(f"{point.images} x {point.tokens}" if point.images else "text alone", *cells)
    fits = [f"{exponent(points, name, of):.2f}" for of in ("time", "memory") for name in alignments]
    shown.add("exponent", *[""] * len(alignments), *fits)
    return shown


@drawn
def figure(points: Sequence[Point], busy: bool) -> Figure:
    """Time and memory against visual tokens; the exponents are in the legend."""
    drawn = Figure(figsize=(9.6, 3.9), layout="constrained")
    unit = "processor ms" if jax.default_backend() == "cpu" else "ms"
    for number, (of, label) in enumerate((("time", unit), ("memory", "MB")), start=1):
        axes = drawn.add_subplot(1, 2, number)
        for at, name in enumerate(points[0].timed):
            values = [1e3 * seconds_of(p.timed[name]) if of == "time" else p.memory[name] / 1e6 for p in points]
            some = sorted(zip([p.visual for p in points[1:]], values[1:], strict=True))
            grows = f"{NAMES[name]}: exponent {exponent(points, name, of):.2f}"
            axes.plot(*zip(*some, strict=True), color=COLORS[at], marker=MARKERS[at], markersize=5, label=grows)
            axes.axhline(values[0], color=COLORS[at], linewidth=0.7, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks([64, 256, 1024, 4096], ["64", "256", "1,024", "4,096"])
        axes.set_xlabel("visual tokens (dotted: the text alone)")
        axes.set_ylabel(label)
        axes.set_title("Time of a question" + (", on a busy machine" if busy else "") if of == "time" else "Memory")
        axes.legend(loc="upper left")
    return drawn


def record(points: Sequence[Point]) -> list[dict[str, Any]]:
    """All of it, for a JSON file."""
    return [
        {
            "images": point.images,
            "tokens": point.tokens,
            **point.watch.says(),
            "alignments": {
                name: {"seconds": timed.seconds, "processor": timed.processor, "memory": point.memory[name]}
                for name, timed in point.timed.items()
            },
        }
        for point in points
    ]
