"""Our parameters -> tensors in somebody else's layout, by the same rows that import them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from saisa_jax.config import ModelConfig
from saisa_jax.convert.tables import PARTS, ConvertError, Row, table
from saisa_jax.convert.tensors import INDEX, SINGLE

SHARD_BYTES = 5_000_000_000


def to_tensors(
    params: Mapping[str, Any], config: ModelConfig, layout: str, *, parts: Sequence[str] = PARTS, dtype: Any = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (key, tensor) in the layout, one tensor at a time.

    Args:
      params: our tree, numpy or jax leaves, boxes removed.
      parts: of decoder, projector, vision, those of the layout that are wanted.
      dtype: of the tensors; None: that of the parameters.

    Raises:
      ConvertError: parameters that the rows want and the tree lacks, or that have another shape; all are listed.
    """
    for row, leaf in _leaves(params, config, layout, parts):
        array = np.asarray(leaf)
        array = array if dtype is None else array.astype(dtype)
        for i, key in enumerate(row.keys):
            yield key, row.to_theirs(array if row.layers is None else array[i])


def _leaves(params: Mapping[str, Any], config: ModelConfig, layout: str, parts: Sequence[str]) -> list[tuple[Row, Any]]:
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    rows = table(config, layout).only(parts)
    problems = [f"missing    {row.path} {list(row.shape)}" for row in rows if row.path not in flat]
    problems += [
        f"misshaped  {row.path} is {list(flat[row.path].shape)}, expected {list(row.shape)}"
        for row in rows
        if row.path in flat and tuple(flat[row.path].shape) != row.shape
    ]
    if problems:
        raise ConvertError("these parameters are not those of the config:\n  " + "\n  ".join(problems))
    return [(row, flat[row.path]) for row in rows]


def export_params(
    params: Mapping[str, Any],
    config: ModelConfig,
    layout: str,
    directory: str | Path,
    *,
    parts: Sequence[str] = PARTS,
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Writes safetensors into `directory`: one file, or shards of at most `shard_bytes` with an index.

    At most one shard is held in memory. The index, or the single file, is written last and under its final name only
    when whole, so that an interrupted export does not look finished.

    Returns:
      The files written.

    Raises:
      ConvertError: see `to_tensors`; or the directory already holds a checkpoint.
    """
    directory = Path(directory)
    taken = sorted(path.name for path in directory.glob("*.safetensors*"))
    if taken:
        raise ConvertError(f"{directory} already holds {', '.join(taken)}; export into an empty directory")
    shards = _plan(_leaves(params, config, layout, parts), dtype, shard_bytes)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = to_tensors(params, config, layout, parts=parts, dtype=dtype)
    if len(shards) == 1:
        return [_write(dict(tensors), directory / SINGLE)]
    written, where, total = [], {}, 0
    for n, keys in enumerate(shards, start=1):
        file = f"model-{n:05d}-of-{len(shards):05d}.safetensors"
        held = dict(next(tensors) for _ in keys)
        written.append(_write(held, directory / file))
        where.update(dict.fromkeys(held, file))
        total += sum(tensor.nbytes for tensor in held.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    partial = directory / f"{INDEX}.partial"
    partial.write_text(json.dumps(index, indent=2) + "\n")
    return [*written, partial.rename(directory / INDEX)]


def _plan(leaves: list[tuple[Row, Any]], dtype: Any, shard_bytes: int) -> list[list[str]]:
    """The keys of each shard, in the order of `to_tensors`, from shapes alone."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for row, leaf in leaves:
        size = int(np.prod(row.theirs)) * np.dtype(dtype or leaf.dtype).itemsize
        for key in row.keys:
            if shards[-1] and size > room:
                shards.append([])
                room = shard_bytes
            shards[-1].append(key)
            room -= size
    return shards


def _write(tensors: dict[str, np.ndarray], path: Path) -> Path:
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial, metadata={"format": "pt"})  # transformers asks for this entry
    partial.chmod(0o644)  # save_file makes files private
    return partial.rename(path)
