"""What the picture is worth to each layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from saisa_jax.report.plots.style import COLORS, FAINT, SIZE, drawn


@drawn
def layer_use(title: str, divergence: np.ndarray, attention: np.ndarray, chosen: Sequence[int]) -> Figure:
    """What the picture is worth to each layer (`evaluation/layers.py`): divergence above, attention below.

    Args:
      title: of the figure.
      divergence: [L], nats a token.
      attention: [L], 0 to 1.
      chosen: layers that are drawn as proposed.
    """
    figure = Figure(figsize=(SIZE[0] * 1.3, SIZE[1] * 1.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    numbers = np.arange(len(divergence))
    colors = [COLORS[1] if layer in chosen else FAINT for layer in numbers]
    above.set_title(title, pad=8)
    above.bar(numbers, divergence, color=colors, width=0.7)
    above.set_ylabel("divergence without\nthe picture, nats a token")
    above.legend(handles=[Patch(color=COLORS[1], label="proposed for model.visual_layers")], loc="upper right")
    below.plot(numbers, attention, color=COLORS[0], marker="o", markersize=3.5, linewidth=1.2, clip_on=False)
    below.set_ylim(bottom=0)
    below.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    below.set_ylabel("attention\non the picture")
    below.set_xlabel("layer")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (above, below):
        axes.tick_params(length=0)
    return figure
