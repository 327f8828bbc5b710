"""What all figures share: colours, size, and how they become PNG files. No global state of matplotlib is touched."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any, ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, distinguishable with color blindness; markers differ as well.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, FAINT = "#222222", "#8a8a8a"
STYLE: Any = {
    "font.size": 9.5,
    "axes.edgecolor": "#9a9a9a",
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "text.color": INK,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
SIZE = (5.4, 3.6)  # inches
PIXELS_PER_INCH = 200

P = ParamSpec("P")


def drawn(draw: Callable[P, Figure]) -> Callable[P, bytes]:
    """Makes a function that returns a figure one that returns a PNG file."""

    @functools.wraps(draw)
    def png(*args: P.args, **kwargs: P.kwargs) -> bytes:
        out = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            draw(*args, **kwargs).savefig(out, format="png", dpi=PIXELS_PER_INCH, facecolor="white")
        return out.getvalue()

    return png


def new_axes(title: str, size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, pad=8)
    axes.tick_params(length=0)
    return figure, axes


def look(number: int) -> dict[str, Any]:
    """Colour and marker of a run; the first 49 differ."""
    return {"color": color(number), "marker": MARKERS[(number + number // len(COLORS)) % len(MARKERS)]}


def color(number: int) -> str:
    return COLORS[number % len(COLORS)]
