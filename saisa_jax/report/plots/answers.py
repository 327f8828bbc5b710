"""Right and wrong answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from saisa_jax.evaluation.scorers.words import normalise
from saisa_jax.report.plots.style import INK, SIZE, color, drawn, look, new_axes
from saisa_jax.report.runs import Run


@drawn
def accuracy_by_kind(title: str, runs: Sequence[Run]) -> Figure:
    """Accuracy of every kind of question, with 95% intervals."""
    first: Any = runs[0].evaluation
    kinds = list(first["kinds"])
    figure, axes = new_axes(title, (SIZE[0], max(SIZE[1], 0.9 + len(kinds) * (0.3 + 0.1 * len(runs)))))
    lowest, labelled = 1.0, set()
    for place, run in enumerate(runs):
        record: Any = run.evaluation
        shift = (place - (len(runs) - 1) / 2) * 0.7 / len(runs)
        for row, kind in enumerate(kinds):
            part = record["kinds"].get(kind)
            if part is None:
                continue
            low, high = part["interval"]
            shade = color(run.number)
            axes.plot([low, high], [row + shift] * 2, color=shade, linewidth=2, alpha=0.55, solid_capstyle="round")
            axes.plot(
                part["accuracy"],
                row + shift,
                **look(run.number),
                markersize=6.5,
                markeredgecolor="white",
                linestyle="none",
                label=None if run.number in labelled or len(runs) == 1 else run.label,
            )
            labelled.add(run.number)
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


@drawn
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
    figure, axes = new_axes(title, (SIZE[0], 1.1 + 0.24 * len(truths)))
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
