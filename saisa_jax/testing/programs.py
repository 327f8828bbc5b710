"""What a traced program computes: its equations, loops multiplied out, and the FLOPs of its matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every equation of a jaxpr and of those inside it, with the number of times that it runs."""
    is_program = lambda value: hasattr(value, "eqns") or hasattr(value, "jaxpr")  # noqa: E731
    for equation in jaxpr.eqns:
        yield equation, times
        inside = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(value):
                yield from equations(getattr(value, "jaxpr", value), inside)


def products_in(jaxpr: Any) -> int:
    """FLOPs of the matrix products and convolutions in a program, loops multiplied out."""
    total = 0
    for equation, times in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            summed = np.prod([left[axis] for axis in contracted])
            total += times * 2 * int(np.prod(equation.outvars[0].aval.shape) * summed)
        if equation.primitive.name == "conv_general_dilated":
            kernel, outputs = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec[0]
            products = int(np.prod(equation.outvars[0].aval.shape) * np.prod(kernel))
            total += times * 2 * products // kernel[outputs]
    return total
