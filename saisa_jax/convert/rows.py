"""One row per parameter: its path here, its name in another program's checkpoint, and how one becomes the other.

A `TensorRow` says that our parameter `path`, stacked over `layers`, is made of the tensors `key.format(i=layer)`, each
of which is transposed by `axes`, padded with zeros where the vocabulary is, and reshaped. All of that is invertible, so
the same row serves import and export, bit for bit.

The functions below make rows of torch's layers; `families/` and `layouts.py` name them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from saisa_jax.errors import UserError

PARTS = ("decoder", "projector", "vision")

Shape = tuple[int, ...]


class ConvertError(UserError, ValueError):
    """A checkpoint that does not fit; the message lists every tensor concerned."""


@dataclass(frozen=True)
class TensorRow:
    """One parameter of ours and the tensors of theirs that it is made of."""

    part: str  # decoder | projector | vision
    path: str  # ours: "layers/attn/q_proj/kernel"
    key: str  # theirs, with {i} for the layer where it is stacked: "model.layers.{i}.self_attn.q_proj.weight"
    theirs: Shape  # of one tensor
    ours: Shape  # of one layer
    axes: Shape  # `theirs` transposed by these has the order of `ours`
    layers: Shape | None = None  # the layers that ours stacks, in order; None: not stacked

    @property
    def keys(self) -> tuple[str, ...]:
        """Their tensors, in the order in which ours stacks them."""
        return (self.key,) if self.layers is None else tuple(self.key.format(i=i) for i in self.layers)

    @property
    def shape(self) -> Shape:
        """Of the whole parameter, layers first."""
        return self.ours if self.layers is None else (len(self.layers), *self.ours)

    @property
    def _transposed(self) -> Shape:
        return tuple(self.theirs[axis] for axis in self.axes)

    def fill(self, out: np.ndarray, tensor: np.ndarray) -> None:
        """Writes one tensor of theirs into one layer of ours, `out`, which holds zeros."""
        array = tensor.transpose(self.axes)
        if math.prod(self.ours) == tensor.size:
            out[...] = array.reshape(self.ours)
        else:  # a padded vocabulary; such rows never split an axis
            out[tuple(slice(size) for size in array.shape)] = array

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """One tensor of theirs as one layer of ours."""
        out = np.zeros(self.ours, tensor.dtype)
        self.fill(out, tensor)
        return out

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`; entries of the padded vocabulary are cropped."""
        transposed = self._transposed
        if array.size != math.prod(transposed):
            array = array[tuple(slice(size) for size in transposed)]
        inverse = tuple(int(i) for i in np.argsort(self.axes))
        return np.ascontiguousarray(array.reshape(transposed).transpose(inverse))


def part_of_path(path: str) -> str:
    """The part that a parameter of ours belongs to: decoder, vision, or projector, which stands between these."""
    if path.startswith("vision/"):
        return "vision"
    return "projector" if "visual_proj/" in path or path.startswith("cross_layers/") else "decoder"


def plain(path: str, key: str, shape: Shape, layers: Shape | None = None, ours: Shape | None = None) -> TensorRow:
    """A tensor of the same order on both sides; `ours` where it is padded or loses axes of size one."""
    axes = tuple(range(len(shape)))
    return TensorRow(part_of_path(path), path, key, shape, shape if ours is None else ours, axes, layers)


def dense(
    path: str, key: str, inputs: Shape, outputs: Shape, layers: Shape | None = None, bias: bool = True
) -> Iterator[TensorRow]:
    """torch's Linear, weight (out, in), as a DenseGeneral, kernel (*inputs, *outputs)."""
    theirs = (math.prod(outputs), math.prod(inputs))
    part = part_of_path(path)
    yield TensorRow(part, f"{path}/kernel", f"{key}.weight", theirs, (*inputs, *outputs), (1, 0), layers)
    if bias:
        yield plain(f"{path}/bias", f"{key}.bias", (math.prod(outputs),), layers, ours=outputs)


def norm(path: str, key: str, width: int, layers: Shape | None = None) -> Iterator[TensorRow]:
    """torch's LayerNorm."""
    yield plain(f"{path}/scale", f"{key}.weight", (width,), layers)
    yield plain(f"{path}/bias", f"{key}.bias", (width,), layers)


def convolution(
    path: str, key: str, inputs: int, outputs: int, size: int, layers: Shape | None = None, bias: bool = True
) -> Iterator[TensorRow]:
    """torch's convolution (out, in, height, width) as ours (height, width, in, out)."""
    theirs, ours = (outputs, inputs, size, size), (size, size, inputs, outputs)
    yield TensorRow(part_of_path(path), f"{path}/kernel", f"{key}.weight", theirs, ours, (2, 3, 1, 0), layers)
    if bias:
        yield plain(f"{path}/bias", f"{key}.bias", (outputs,), layers)
