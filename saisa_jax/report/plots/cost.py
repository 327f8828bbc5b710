"""Accuracy against what it costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from saisa_jax import flops
from saisa_jax.config import FlamingoConfig, ModelConfig, ProjectorConfig
from saisa_jax.report import units
from saisa_jax.report.plots.style import FAINT, INK, color, drawn, look, new_axes
from saisa_jax.report.runs import NAMES, Run, seeds

PAPER = ("llava", "naavit", "saisa")  # alignments that are drawn whether they were run or not
# Vision and head, which all alignments share, are grey; related parts are shades of one color.
PART_COLORS = ("#cdd2d8", "#E69F00", "#0b4f8a", "#3f8fd2", "#a6cdee", "#D55E00", "#009E73", "#7d838a", "#56B4E9")


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


@drawn
def accuracy_against_prefill(title: str, runs: Sequence[Run], convention: str) -> Figure:
    """The paper's figure 1 for evaluated runs, and what the alignments cost that were not run.

    Args:
      title: of the figure.
      runs: evaluated ones.
      convention: of `flops.CONVENTIONS`.
    """
    figure, axes = new_axes(title)
    costs = prefill_by_alignment(runs[0], convention)
    spent: list[float] = [run.evaluation["prefill_flops"][convention] for run in runs]  # type: ignore[index]
    unit, prefix = units.thousands(max(*costs.values(), *spent))
    _place(axes, runs, lambda run: run.evaluation["prefill_flops"][convention] / unit)  # type: ignore[index]
    present = {run.model.alignment for run in runs}
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
    return _finished(figure, axes, max(*costs.values(), *spent) / unit, f"prefill {prefix}FLOPs per question")


@drawn
def accuracy_against_training(title: str, runs: Sequence[Run]) -> Figure:
    """The same against the FLOPs of both stages; the runs are evaluated and finished."""
    figure, axes = new_axes(title)
    most = max(run.train_flops or 0.0 for run in runs)
    unit, prefix = units.thousands(most)
    _place(axes, runs, lambda run: (run.train_flops or 0.0) / unit)
    return _finished(figure, axes, most / unit, f"training {prefix}FLOPs")


@drawn
def accuracy_against_seconds(title: str, runs: Sequence[Run]) -> Figure:
    """The same against the median seconds of a first question, with its quartiles; the runs have been timed."""
    figure, axes = new_axes(title)
    quartiles = {run.label: 1e3 * np.quantile(run.first_question or [math.nan], (0.25, 0.5, 0.75)) for run in runs}
    _place(axes, runs, lambda run: quartiles[run.label][1])
    for run in runs:
        record: Any = run.evaluation
        low, _, high = quartiles[run.label]
        axes.plot([low, high], [record["accuracy"]] * 2, color=color(run.number), linewidth=2, alpha=0.55)
    slowest = max(high for _, _, high in quartiles.values())
    return _finished(figure, axes, slowest, "ms until the answer to a first question begins")


def _finished(figure: Figure, axes: Axes, most: float, label: str) -> Figure:
    """The figure with its axis of costs, from 0 to a little more than the largest, and its legend."""
    axes.set_xlim(0, most * 1.12)
    axes.set_xlabel(label)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _place(axes: Axes, runs: Sequence[Run], cost: Callable[[Run], float]) -> None:
    """The accuracy of evaluated runs, with its interval, at what they cost; seeds of a recipe look alike."""
    for together in seeds(runs).values():
        records: list[Any] = [run.evaluation for run in together]
        places = [cost(run) for run in together]
        for place, record in zip(places, records, strict=True):
            axes.plot([place, place], record["interval"], color=color(together[0].number), linewidth=2, alpha=0.55)
        reached = ", ".join(f"{record['accuracy']:.1%}" for record in records)
        axes.plot(
            places,
            [record["accuracy"] for record in records],
            **look(together[0].number),
            markersize=7.5,
            markeredgecolor="white",
            linestyle="none",
            label=f"{together[0].label}: {reached}",
            zorder=4,
        )
    _accuracy_axis(axes, runs)


def _accuracy_axis(axes: Axes, runs: Sequence[Run]) -> None:
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


@drawn
def cost_by_part(title: str, run: Run) -> Figure:
    """What the parts of a prefill cost under each alignment, for a model of the run's size."""
    record: Any = run.evaluation
    text, images = round(record["prompt_tokens"]), record["images_per_question"]
    models = {name: alignment_like(run.model, name) for name in dict.fromkeys((*PAPER, run.model.alignment))}
    costs = {name: flops.prefill(model, text, images) for name, model in models.items()}
    unit, prefix = units.thousands(max(cost.total for cost in costs.values()))
    figure, axes = new_axes(title, (10.8, 2.5))
    left = np.zeros(len(costs))
    for part, shade in zip(flops.PARTS, PART_COLORS, strict=True):
        if not any(cost.parts[part] for cost in costs.values()):
            continue
        widths = np.array([cost.parts[part] for cost in costs.values()]) / unit
        axes.barh(range(len(costs)), widths, 0.62, left=left, color=shade, edgecolor="white", linewidth=0.7, label=part)
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
