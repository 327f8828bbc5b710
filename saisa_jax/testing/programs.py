"""What a traced program computes: its equations, loops multiplied out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every equation of a jaxpr and of those inside it, with the number of times that it runs."""
    is_program = lambda value: hasattr(value, "eqns") or hasattr(value, "jaxpr")  # noqa: E731
    for equation in jaxpr.eqns:
        yield equation, times
        inside = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(value):
                yield from equations(getattr(value, "jaxpr", value), inside)
