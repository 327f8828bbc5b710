"""Our parameters -> tensors in somebody else's layout, by the same rows that import them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from saisa_jax.config import ModelConfig
from saisa_jax.convert.files.safetensors import DTYPES, FLOATS, NAMES, nbytes, write_file
from saisa_jax.convert.files.tensors import INDEX, SINGLE, TensorSource
from saisa_jax.convert.layouts import check_says, layout_for
from saisa_jax.convert.rows import PARTS, ConvertError, TensorRow, part_of_path

SHARD_BYTES = 5_000_000_000


class ParamsSource:
    """Parameters of ours as the tensors of a layout.

    Args:
      params: our tree, numpy or jax leaves, boxes removed.
      parts: of decoder, projector, vision, those of the layout that are wanted.
      dtype: of the tensors: one for all; or by key, the others as the parameters are; None: as the parameters are.

    Raises:
      ConvertError: a model that the layout cannot describe; parameters that the layout has no place for, or that the
        rows want and the tree lacks, or that have another shape; all are listed.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        config: ModelConfig,
        layout: str,
        *,
        parts: Sequence[str] = PARTS,
        dtype: Any = None,
    ):
        self.where = Path("the parameters")
        flat: dict[str, Any] = flatten_dict(params, sep="/")
        check_says(config, layout)
        held = layout_for(config, layout)
        rows, wanted = held.only(parts), set(held.parts).intersection(parts)
        _check({path: leaf for path, leaf in flat.items() if part_of_path(path) in wanted}, rows)
        self._leaf = {row.path: flat[row.path] for row in rows}
        self._row = {key: (row, i) for row in rows for i, key in enumerate(row.keys)}
        self._dtype = dtype
        self._held: tuple[str, Any] = ("", None)  # the parameter read last, on the host

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of the rows, so that a stacked parameter is read as one."""
        return tuple(self._row)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._row[key][0].theirs

    def dtype_name(self, key: str) -> str:
        named = self._dtype.get(key) if isinstance(self._dtype, Mapping) else self._dtype
        return NAMES[np.dtype(named if named is not None else self._leaf[self._row[key][0].path].dtype)]

    def is_float(self, key: str) -> bool:
        return self.dtype_name(key) in FLOATS

    def read(self, key: str) -> np.ndarray:
        row, i = self._row[key]
        if self._held[0] != row.path:
            self._held = ("", None)  # let go of the last one before the next comes
            self._held = (row.path, np.asarray(self._leaf[row.path]))
        array = self._held[1]
        tensor = row.to_theirs(array if row.layers is None else array[i])
        return tensor.astype(DTYPES[self.dtype_name(key)], copy=False)


class CastSource:
    """A source whose tensors are all of one dtype."""

    def __init__(self, source: TensorSource, dtype: Any):
        self.where = source.where
        self.names = source.names
        self._source, self._dtype = source, np.dtype(dtype)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._source.shape(key)

    def dtype_name(self, key: str) -> str:
        return NAMES[self._dtype]

    def is_float(self, key: str) -> bool:
        return self.dtype_name(key) in FLOATS

    def read(self, key: str) -> np.ndarray:
        return self._source.read(key).astype(self._dtype, copy=False)


def _check(flat: Mapping[str, Any], rows: Sequence[TensorRow]) -> None:
    problems = [f"missing    {row.path} {list(row.shape)}" for row in rows if row.path not in flat]
    problems += [
        f"misshaped  {row.path} is {list(flat[row.path].shape)}, expected {list(row.shape)}"
        for row in rows
        if row.path in flat and tuple(flat[row.path].shape) != row.shape
    ]
    known = {row.path for row in rows}
    problems += [f"no place   {path} {list(leaf.shape)}" for path, leaf in flat.items() if path not in known]
    if problems:
        raise ConvertError(
            "these parameters are not those that the layout holds for this config:\n  " + "\n  ".join(problems)
        )


def to_tensors(
    params: Mapping[str, Any], config: ModelConfig, layout: str, *, parts: Sequence[str] = PARTS, dtype: Any = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (key, tensor) in the layout, one tensor at a time; arguments and errors as of `ParamsSource`."""
    source = ParamsSource(params, config, layout, parts=parts, dtype=dtype)
    for key in source.names:
        yield key, source.read(key)


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

    The index, or the single file, is written last and under its final name only when whole, so that an interrupted
    export does not look finished.

    Returns:
      The files written.

    Raises:
      ConvertError: see `ParamsSource`; or the directory already holds a checkpoint.
    """
    directory = Path(directory)
    taken = sorted(path.name for path in directory.glob("*.safetensors*"))
    if taken:
        raise ConvertError(f"{directory} already holds {', '.join(taken)}; export into an empty directory")
    source = ParamsSource(params, config, layout, parts=parts, dtype=dtype)
    directory.mkdir(parents=True, exist_ok=True)
    return write_shards({key: (source, key) for key in source.names}, directory, shard_bytes)


def write_shards(
    tensors: Mapping[str, tuple[TensorSource, str]], directory: Path, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Writes tensors of any sources, one after the other, as `export_params` does.

    Args:
      tensors: the name in the files -> (source, its name there).
    """
    specs = [(name, source.dtype_name(key), source.shape(key)) for name, (source, key) in tensors.items()]
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    room = shard_bytes
    for spec in specs:
        size = nbytes(*spec[1:])
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(spec)
        room -= size
    read = lambda name: tensors[name][0].read(tensors[name][1])  # noqa: E731
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    written = []
    for file, shard in zip(names, shards, strict=True):
        partial = directory / f"{file}.partial"
        write_file(partial, shard, read)
        written.append(partial.rename(directory / file))
    if len(shards) > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name, _, _ in shard}
        total = sum(nbytes(*spec[1:]) for spec in specs)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        partial = directory / f"{INDEX}.partial"
        partial.write_text(json.dumps(index, indent=2) + "\n")
        written.append(partial.rename(directory / INDEX))
    return written
