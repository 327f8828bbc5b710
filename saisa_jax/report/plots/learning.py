"""How a run learns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from saisa_jax.report.plots.style import color, drawn, look, new_axes
from saisa_jax.report.runs import Run, StageRecord


@drawn
def loss(title: str, stages: Sequence[tuple[Run, StageRecord]]) -> Figure:
    """Training and held-out loss of one stage.

    Args:
      title: of the figure.
      stages: (run, its stage); the raw training loss is shown if there is only one.
    """
    figure, axes = new_axes(title)
    alone, labelled = len(stages) == 1, set()
    for run, stage in stages:
        line = color(run.number)
        steps, losses = [row["step"] for row in stage.train], [row["loss"] for row in stage.train]
        if alone:
            axes.plot(steps, losses, color=line, alpha=0.22, linewidth=0.9)
        name = "training, smoothed" if alone else None if run.number in labelled else run.label
        labelled.add(run.number)
        axes.plot(steps, smooth(losses, len(losses) / 60), color=line, linewidth=1.8, label=name)
        axes.plot(
            [row["step"] for row in stage.held_out],
            [row["loss"] for row in stage.held_out],
            **look(1 if alone else run.number),
            linestyle="none",
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            label="held out" if alone and stage.held_out else None,
            zorder=3,
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(loc="upper right")
    return figure


def smooth(values: Sequence[float], width: float) -> list[float]:
    """A running mean with Gaussian weights, centred; what is not finite is left out.

    Args:
      values: in order.
      width: standard deviation of the weights, in values.
    """
    numbers = np.asarray(values, np.float64)
    finite = np.isfinite(numbers)
    reach = max(1, math.ceil(3 * width))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(width, 1e-9)) ** 2)
    total, weight = (np.convolve(x, weights)[reach:-reach] for x in (np.where(finite, numbers, 0.0), finite * 1.0))
    return np.where(weight > 0, total / np.where(weight > 0, weight, 1.0), math.nan).tolist()
