"""Somebody else's checkpoint -> our parameters, one row after the other.

    result = import_model("llava-1.5-7b-hf", dtype="float32")
    result.config, result.params, result.ignored

`read_params` is the core: it yields one finished parameter at a time, so that whoever wants them on devices can place
each before the next is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from flax.traverse_util import unflatten_dict

from saisa_jax.config import ModelConfig
from saisa_jax.convert.configs import config_from_hf, vision_directory
from saisa_jax.convert.files.open import open_checkpoint
from saisa_jax.convert.files.safetensors import DTYPES
from saisa_jax.convert.files.tensors import CheckpointSource, TensorSource
from saisa_jax.convert.layouts import MULTIMODAL, TOWER_APART, Layout, layout_for
from saisa_jax.convert.match import Match, layout_of, match, parts_in, settle_head
from saisa_jax.convert.rows import ConvertError, TensorRow


@dataclass(frozen=True)
class Imported:
    """What came of a checkpoint directory."""

    config: ModelConfig
    params: dict[str, Any]  # nested, numpy leaves
    ignored: tuple[str, ...]  # tensors in the files that the model never reads


def read_params(
    tensors: TensorSource,
    layout: Layout,
    parts: Sequence[str],
    spelt: dict[str, str],
    dtype: Any = None,
    allow_nonfinite: bool = False,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (path, array) for each row of the parts, reading tensor by tensor; nothing but the one array is held.

    After the last, raises ConvertError if there were tensors that hold inf or NaN, or warns of them; all are listed.

    Args:
      spelt: what `match` found and checked.
      dtype: of the arrays; None: that of the files.
      allow_nonfinite: only warn.
    """
    broken: list[str] = []
    for row in layout.only(parts):
        yield row.path, _read_row(tensors, row, spelt, dtype, broken)
    listed = f" in {len(broken)} tensors:\n  " + "\n  ".join(broken)
    if broken and allow_nonfinite:
        logging.warning("%s holds inf or NaN, and they are kept,%s", tensors.where, listed)
    elif broken:
        raise ConvertError(
            f"{tensors.where} holds inf or NaN, with which no model can answer or be trained,{listed}\n"
            "(--allow_nonfinite imports them as they are)"
        )


def _read_row(
    tensors: TensorSource, row: TensorRow, spelt: dict[str, str], dtype: Any, broken: list[str]
) -> np.ndarray:
    first = DTYPES[tensors.dtype_name(spelt[row.keys[0]])]
    array = np.zeros(row.shape, dtype if dtype is not None else first)
    for i, key in enumerate(row.keys):  # straight into its place: at most one tensor of theirs is held beside it
        tensor = tensors.read(spelt[key])
        if not np.isfinite(tensor).all():
            broken.append(spelt[key])
        row.fill(array if row.layers is None else array[i], tensor)
    return array


@dataclass(frozen=True)
class Piece:
    """One source of an import, matched: which of its tensors become which parameters."""

    name: str  # model, or vision: a tower that lies apart
    tensors: CheckpointSource
    layout: Layout
    parts: tuple[str, ...]
    match: Match

    def read(self, dtype: Any = None, allow_nonfinite: bool = False) -> Iterator[tuple[str, np.ndarray]]:
        """`read_params` of it."""
        return read_params(self.tensors, self.layout, self.parts, self.match.spelt, dtype, allow_nonfinite)


def find_pieces(
    tensors: CheckpointSource,
    config: ModelConfig,
    layout: str,
    vision: str | Path | None = None,
    dtype: Any = None,
) -> tuple[Piece, ...]:
    """The sources that a model is made of: a checkpoint, and the directory of its tower if that lies apart.

    Args:
      vision: that directory; None: the tower is in the checkpoint, or (saisa, llava) in the folder that it names.

    Raises:
      ConvertError: a tower that is missing or one too many, or tensors that do not fit; all of a source's are listed.
    """
    rows = layout_for(config, layout)
    parts = parts_in(tensors, rows)
    if layout in ("llava-hf", "hf") and (vision or "vision" not in parts):
        raise ConvertError(
            f"{tensors.where} is in layout {layout!r}, which holds its own vision tower: leave out --vision"
            if vision
            else f"{tensors.where} holds no vision tower, which the layout {layout!r} requires"
        )
    if layout in TOWER_APART and (vision or "vision" not in parts):
        parts, vision = ("decoder", "projector"), vision_directory(tensors.where, vision)
    found: list[tuple[str, CheckpointSource, Layout, tuple[str, ...]]] = [("model", tensors, rows, parts)]
    if vision:
        found.append(("vision", open_checkpoint(vision), layout_for(config, "hf-vision"), ("vision",)))
    pieces = tuple(Piece(*piece, match(*piece[1:], dtype)) for piece in found)
    for piece in pieces:
        piece.match.checked()
    return pieces


def import_params(
    directory: str | Path,
    config: ModelConfig,
    *,
    layout: str | None = None,
    parts: Sequence[str] | None = None,
    dtype: Any = None,
) -> Imported:
    """The parameters that one directory holds for a model of `config`: a whole tree, or the branches that are there.

    Args:
      directory: safetensors, single or sharded, or a GGUF file.
      layout: one of `layouts.LAYOUTS`; None: told from the tensors' names.
      parts: of decoder, projector, vision; None: what the layout holds, the tower only if it is in the directory.
      dtype: of the parameters; None: that of the files.

    Raises:
      ConvertError: missing, unexpected or misshaped tensors; the message lists all of them. Raised before the first
        parameter is read.
    """
    tensors = open_checkpoint(directory)
    rows = layout_for(config, layout or layout_of(tensors))
    parts = parts_in(tensors, rows) if parts is None else parts
    found = match(tensors, rows, parts, dtype)
    flat = dict(read_params(tensors, rows, parts, found.checked(), dtype))
    return Imported(config, unflatten_dict(flat, sep="/"), found.ignored)


def import_model(
    directory: str | Path, *, vision: str | Path | None = None, layout: str | None = None, dtype: Any = None
) -> Imported:
    """A whole multimodal model: decoder, projectors and vision tower, with the config that their files describe.

    Args:
      directory: a checkpoint in the layout saisa, llava or llava-hf.
      vision: the directory of the vision tower, if it is not in the checkpoint (then the checkpoint's own is ignored,
        as the official code does).
      layout: as in `import_params`.
      dtype: of the parameters; None: that of the files.

    Raises:
      ConvertError: anything that does not fit, or no vision tower.
    """
    tensors = open_checkpoint(directory)
    layout = layout or layout_of(tensors)
    if layout not in MULTIMODAL:
        raise ConvertError(f"{directory} is in layout {layout!r}, which is not a whole multimodal model")
    config = config_from_hf(directory, layout=layout, vision=vision, raw=tensors.config())
    config = settle_head(tensors, config, layout)
    pieces = find_pieces(tensors, config, layout, vision, dtype)
    flat = {path: array for piece in pieces for path, array in piece.read(dtype)}
    ignored = tuple(key for piece in pieces for key in piece.match.ignored)
    return Imported(config, unflatten_dict(flat, sep="/"), ignored)
