"""A table on the screen and in Markdown from the same cells, and figures as PNG files."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.figure import Figure
from rich.table import Table

from saisa_jax.report.plots import PIXELS_PER_INCH, STYLE


class Grid:
    """Cells under a header; the first column is text, the others are figures."""

    def __init__(self, title: str, *header: str) -> None:
        self.title, self.header = title, header
        self.rows: list[Sequence[str]] = []

    def add(self, *cells: str) -> None:
        self.rows.append(cells)

    def __rich__(self) -> Table:
        table = Table(title=self.title, title_justify="left", title_style="bold")
        for number, name in enumerate(self.header):
            table.add_column(name, justify="right" if number else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        return "\n".join([f"**{self.title}**", "", *("| " + " | ".join(line) + " |" for line in lines), ""])


def png(draw: Callable[[], Figure]) -> bytes:
    """What a function draws, in the style of the report."""
    out = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        draw().savefig(out, format="png", dpi=PIXELS_PER_INCH, facecolor="white")
    return out.getvalue()
