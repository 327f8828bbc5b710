"""The figures, each as the bytes of a PNG file; no global state of matplotlib is touched."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from saisa_jax import flops
from saisa_jax.config import FlamingoConfig, ModelConfig, ProjectorConfig
from saisa_jax.evaluation.scorers.words import normalise
from saisa_jax.report import units
from saisa_jax.report.runs import NAMES, Run, StageRecord

# Okabe and Ito's palette, distinguishable with color blindness; markers differ as well.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PAPER = ("llava", "naavit", "saisa")  # alignments that are drawn whether they were run or not
INK, FAINT = "#222222", "#8a8a8a"
# Vision and head, which all alignments share, are grey; related parts are shades of one color.
PART_COLORS = ("#cdd2d8", "#E69F00", "#0b4f8a", "#3f8fd2", "#a6cdee", "#D55E00", "#009E73", "#7d838a", "#56B4E9")
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


def _figure(draw: Callable[P, Figure]) -> Callable[P, bytes]:
    """Makes a function that returns a figure one that returns a PNG file."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> bytes:
        out = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            draw(*args, **kwargs).savefig(out, format="png", dpi=PIXELS_PER_INCH, facecolor="white")
        return out.getvalue()

    return drawn


def _axes(title: str, size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, pad=8)
    axes.tick_params(length=0)
    return figure, axes


# --- learning --------------------------------------------------------------------------------------------------------


@_figure
def loss(title: str, stages: Sequence[tuple[str, StageRecord]]) -> Figure:
    """Training and held-out loss of one stage.

    Args:
      title: of the figure.
      stages: (label of the run, its stage); the raw training loss is shown if there is only one.
    """
    figure, axes = _axes(title)
    for number, (label, stage) in enumerate(stages):
        color, alone = COLORS[number % len(COLORS)], len(stages) == 1
        steps, losses = [row["step"] for row in stage.train], [row["loss"] for row in stage.train]
        if alone:
            axes.plot(steps, losses, color=color, alpha=0.22, linewidth=0.9)
        name = "training, smoothed" if alone else label
        axes.plot(steps, smooth(losses, len(losses) / 60), color=color, linewidth=1.8, label=name)
        held_color = COLORS[1] if alone else color
        axes.plot(
            [row["step"] for row in stage.held_out],
            [row["loss"] for row in stage.held_out],
            color=held_color,
            linestyle="none",
            marker=MARKERS[number % len(MARKERS)],
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


# --- accuracy and cost -----------------------------------------------------------------------------------------------


def alignment_like(model: ModelConfig, alignment: str) -> ModelConfig:
    """A model of the same size with another alignment."""
    if alignment == model.alignment:
        return model
    sharing = "per_layer" if alignment == "saisa" else "shared"
    projector = ProjectorConfig(sharing=sharing, hidden_dim=model.projector.hidden_dim)
    return dataclasses.replace(
        model, alignment=alignment, projector=projector, visual_layers=None, flamingo=FlamingoConfig()
    )


def prefill_by_alignment(run: Run, convention: str) -> dict[str, float]:
    """Prefill FLOPs of the mean question of an evaluated run, under each alignment of PAPER and its own."""
    record: Any = run.evaluation
    text, images = round(record["prompt_tokens"]), record["images_per_question"]
    models = {name: alignment_like(run.model, name) for name in dict.fromkeys((*PAPER, run.model.alignment))}
    return {name: flops.prefill(model, text, images, convention=convention).total for name, model in models.items()}


@_figure
def accuracy_against_flops(title: str, runs: Sequence[tuple[int, Run]], convention: str) -> Figure:
    """The paper's figure 1 for these runs, and what the alignments cost that were not run.

    Args:
      title: of the figure.
      runs: evaluated ones, each with the number that gives its colour.
      convention: of `flops.CONVENTIONS`.
    """
    figure, axes = _axes(title)
    costs = prefill_by_alignment(runs[0][1], convention)
    unit, prefix = units.thousands(max(costs.values()))
    for number, run in runs:
        record: Any = run.evaluation
        _place(axes, number, run, record["prefill_flops"][convention] / unit)
    _accuracy_axis(axes, [run for _, run in runs])
    present = {run.model.alignment for _, run in runs}
    for name, cost in costs.items():
        if name not in present:
            axes.axvline(cost / unit, color=FAINT, linestyle=":", linewidth=1.2)
            axes.annotate(
                f"{NAMES[name]}, not run",
                (cost / unit, 0.5),
                xycoords=("data", "axes fraction"),
                xytext=(-4, 0),
                textcoords="offset points",
                rotation=90,
                va="center",
                ha="right",
                color="#666666",
                fontsize=8.5,
            )
    axes.set_xlim(0, max(costs.values()) / unit * 1.12)
    axes.set_xlabel(f"prefill {prefix}FLOPs per question")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@_figure
def accuracy_against_seconds(title: str, runs: Sequence[tuple[int, Run]]) -> Figure:
    """The same against the median seconds of a first question, with its quartiles; the runs have been timed."""
    figure, axes = _axes(title)
    slowest = 0.0
    for number, run in runs:
        low, middle, high = (1e3 * q for q in np.quantile(run.first_question or [math.nan], (0.25, 0.5, 0.75)))
        slowest = max(slowest, high)
        record: Any = run.evaluation
        _place(axes, number, run, middle)
        axes.plot([low, high], [record["accuracy"]] * 2, color=COLORS[number % len(COLORS)], linewidth=2, alpha=0.55)
    _accuracy_axis(axes, [run for _, run in runs])
    axes.set_xlim(0, slowest * 1.12)
    axes.set_xlabel("ms until the answer to a first question begins")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _place(axes: Any, number: int, run: Run, cost: float) -> None:
    """An evaluated run's accuracy, with its interval, at what it costs."""
    record: Any = run.evaluation
    color = COLORS[number % len(COLORS)]
    axes.plot([cost, cost], record["interval"], color=color, linewidth=2, alpha=0.55, zorder=3)
    axes.plot(
        cost,
        record["accuracy"],
        color=color,
        marker=MARKERS[number % len(MARKERS)],
        markersize=7.5,
        markeredgecolor="white",
        linestyle="none",
        label=f"{run.label}: {record['accuracy']:.1%}",
        zorder=4,
    )


def _accuracy_axis(axes: Any, runs: Sequence[Run]) -> None:
    """From a little below the lowest accuracy to 1, with a line for an answer without the image."""
    records: list[Any] = [run.evaluation for run in runs]
    guess = records[0]["baseline"].get("overall", 1.0)
    if records[0]["baseline"]:
        label = f"most frequent answer: {guess:.1%}"
        axes.axhline(guess, color=FAINT, linestyle=(0, (5, 3)), linewidth=1.2, label=label)
    lowest = min(guess, *(record["accuracy"] for record in records))
    axes.set_ylim(max(0.0, lowest - 0.09), 1.005)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("test accuracy")


@_figure
def cost_by_part(title: str, run: Run) -> Figure:
    """What the parts of a prefill cost under each alignment, for a model of the run's size."""
    record: Any = run.evaluation
    text, images = round(record["prompt_tokens"]), record["images_per_question"]
    models = {name: alignment_like(run.model, name) for name in dict.fromkeys((*PAPER, run.model.alignment))}
    costs = {name: flops.prefill(model, text, images) for name, model in models.items()}
    unit, prefix = units.thousands(max(cost.total for cost in costs.values()))
    figure, axes = _axes(title, (10.8, 2.5))
    left = np.zeros(len(costs))
    for part, color in zip(flops.PARTS, PART_COLORS, strict=True):
        if not any(cost.parts[part] for cost in costs.values()):
            continue
        widths = np.array([cost.parts[part] for cost in costs.values()]) / unit
        axes.barh(range(len(costs)), widths, 0.62, left=left, color=color, edgecolor="white", linewidth=0.7, label=part)
        left += widths
    most = left.max()
    for row, total in enumerate(left):
        saved = "" if total == left[0] else f"  ({units.change(total / left[0] - 1)})"
        axes.text(total + 0.008 * most, row, f"{total:.3g}{saved}", va="center", fontsize=9)
    axes.set_yticks(range(len(costs)), [NAMES[name] for name in costs], color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, most * 1.12)
    axes.grid(False, axis="y")
    axes.set_xlabel(f"prefill {prefix}FLOPs per question, end to end")
    figure.legend(loc="outside right center", title="part", alignment="left")
    return figure


# --- right and wrong -------------------------------------------------------------------------------------------------


@_figure
def accuracy_by_kind(title: str, runs: Sequence[tuple[int, Run]]) -> Figure:
    """Accuracy of every kind of question, with 95% intervals."""
    first: Any = runs[0][1].evaluation
    kinds = list(first["kinds"])
    figure, axes = _axes(title, (SIZE[0], max(SIZE[1], 0.9 + len(kinds) * (0.3 + 0.1 * len(runs)))))
    lowest = 1.0
    for place, (number, run) in enumerate(runs):
        record: Any = run.evaluation
        shift = (place - (len(runs) - 1) / 2) * 0.7 / len(runs)
        for row, kind in enumerate(kinds):
            part = record["kinds"].get(kind)
            if part is None:
                continue
            color, (low, high) = COLORS[number % len(COLORS)], part["interval"]
            axes.plot([low, high], [row + shift] * 2, color=color, linewidth=2, alpha=0.55, solid_capstyle="round")
            axes.plot(
                part["accuracy"],
                row + shift,
                color=color,
                marker=MARKERS[number % len(MARKERS)],
                markersize=6.5,
                markeredgecolor="white",
                linestyle="none",
                label=run.label if row == 0 and len(runs) > 1 else None,
            )
            if len(runs) == 1:
                axes.annotate(
                    f"{part['accuracy']:.1%}", (part["accuracy"], row), (0, 7), textcoords="offset points", ha="center"
                )
            lowest = min(lowest, low)
    axes.set_yticks(range(len(kinds)), [f"{kind}\n(n = {first['kinds'][kind]['n']:,})" for kind in kinds], color=INK)
    axes.set_ylim(len(kinds) - 0.45, -0.6)
    axes.set_xlim(max(0.0, math.floor(lowest * 20 - 0.5) / 20), 1.015)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("test accuracy")
    if len(runs) > 1:
        figure.legend(loc="outside lower center", ncols=min(3, len(runs)))
    return figure


@_figure
def confusion(title: str, predictions: Sequence[dict[str, Any]], most: int = 20) -> Figure:
    """Truths against answers, in numbers of questions; colour is the share of the truth's questions.

    Args:
      title: of the figure.
      predictions: of one run.
      most: so many different truths at most, the most frequent ones; other answers share a column.
    """
    kinds: dict[str, str] = {}
    counts: dict[str, int] = {}
    said = [(normalise(row["answers"][0]), row) for row in predictions]
    for truth, row in said:
        kinds[truth] = min(row["kind"], kinds.get(truth, row["kind"]))
        counts[truth] = counts.get(truth, 0) + 1
    frequent = sorted(counts, key=lambda truth: (-counts[truth], truth))[:most]
    truths = sorted(frequent, key=lambda truth: (kinds[truth], truth))
    table = np.zeros((len(truths), len(truths) + 1), int)
    for truth, row in said:
        if truth in truths:
            column = truths.index(row["prediction"]) if row["prediction"] in truths else len(truths)
            table[truths.index(truth), column] += 1
    if not table[:, -1].any():
        table = table[:, :-1]
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    figure, axes = _axes(title, (SIZE[0], 1.1 + 0.24 * len(truths)))
    # The square root keeps a few mistakes among many correct answers visible.
    axes.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
    for (row, column), number in np.ndenumerate(table):
        if number:
            color = "white" if share[row, column] > 0.4 else INK
            axes.text(column, row, f"{number}", ha="center", va="center", fontsize=7, color=color)
    truths = [truth if len(truth) <= 24 else f"{truth[:23]}…" for truth in truths]
    columns = [*truths, "else"][: table.shape[1]]
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(truths)), truths, fontsize=8)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("answer")
    axes.set_ylabel("truth")
    return figure


@_figure
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
    below.plot(numbers, attention, color=COLORS[0], marker="o", markersize=3.5, linewidth=1.2)
    below.set_ylim(bottom=0)
    below.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    below.set_ylabel("attention\non the picture")
    below.set_xlabel("layer")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (above, below):
        axes.tick_params(length=0)
    return figure
