"""Where tensors come from: a protocol, what directories have in common, and a directory of safetensors.

Nothing is loaded until it is asked for, and nothing stays mapped: a tensor is read into memory of its own, so that what
a conversion holds is what it was given and no more.
"""

from __future__ import annotations

import abc
import json
import re
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from saisa_jax.convert.files.safetensors import FLOATS, Header, nbytes, read_header, read_tensor
from saisa_jax.convert.hf_json import CONFIG, read_json
from saisa_jax.convert.rows import ConvertError
from saisa_jax.data.text.tokenizer import load_tokenizer

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@runtime_checkable  # the tests check annotations
class TensorSource(Protocol):
    """Named tensors that can be described without being read."""

    @property
    def where(self) -> Path:
        """The directory or file, for messages."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors, sorted."""
        ...

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        ...

    def dtype_name(self, key: str) -> str:
        """Its dtype in safetensors' spelling: F32, BF16, U8, ..."""
        ...

    def is_float(self, key: str) -> bool:
        """Whether it holds floating-point numbers (quantised checkpoints hold bytes)."""
        ...

    def read(self, key: str) -> np.ndarray:
        """One tensor, in its own dtype, in memory of its own."""
        ...


@runtime_checkable
class CheckpointSource(TensorSource, Protocol):
    """Somebody's checkpoint: tensors, what they are, and how text becomes tokens."""

    def config(self) -> dict[str, Any]:
        """What its config.json says, or would say."""
        ...

    def tokenizer(self) -> Any:
        """Its tokenizer; None: it has none.

        Raises:
          ConvertError, DataError: one that cannot be read.
        """
        ...

    def stored(self, key: str) -> tuple[str, int]:
        """How a tensor is stored: its dtype, or the kind of its quantisation (Q4_1), and its bytes."""
        ...


def read_index(path: Path, suffix: str) -> dict[str, str]:
    """The weight map of an index: tensor -> file of the index's own directory.

    Raises:
      ConvertError: no index, files that leave the directory or are not there.
    """
    try:
        where = json.loads(path.read_text())["weight_map"]
        where = {str(key): str(file) for key, file in where.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConvertError(f"{path} is not an index of {suffix} shards: {error!r}") from error
    # A name with a separator could leave the directory, and no tool that writes shards makes one.
    legal = rf"[^/\\\0:]+\.{suffix}"
    outside = sorted({file for file in where.values() if not re.fullmatch(legal, file)})
    if outside:
        raise ConvertError(f"{path} names files that are not {suffix} of its own directory: {', '.join(outside)}")
    missing = sorted({file for file in where.values() if not (path.parent / file).is_file()})
    if missing:
        raise ConvertError(f"{path} names shards that are not there: {', '.join(missing)}")
    return where


def check_index(path: Path, where: dict[str, str], held: dict[str, set[str]]) -> None:
    """Raises ConvertError where an index says other than its shards, each tensor listed."""
    lacking = [f"{key} (said to be in {file})" for key, file in where.items() if key not in held[file]]
    unlisted = [f"{key} (in {file}, not in the index)" for file in held for key in held[file] if key not in where]
    if lacking or unlisted:
        raise ConvertError(f"{path} contradicts its shards:\n  " + "\n  ".join(sorted(lacking + unlisted)))


class Directory(abc.ABC):
    """What the directories have in common: the files beside the tensors, and the dtypes as they are."""

    where: Path

    def config(self) -> dict[str, Any]:
        return read_json(self.where / CONFIG)

    def tokenizer(self) -> Any:
        found = any((self.where / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
        return load_tokenizer(self.where) if found else None

    @abc.abstractmethod
    def dtype_name(self, key: str) -> str: ...

    def is_float(self, key: str) -> bool:
        return self.dtype_name(key) in FLOATS

    @abc.abstractmethod
    def shape(self, key: str) -> tuple[int, ...]: ...

    def stored(self, key: str) -> tuple[str, int]:
        return self.dtype_name(key), nbytes(self.dtype_name(key), self.shape(key))


class TensorDirectory(Directory):
    """The tensors of a directory of safetensors: one file, or shards with an index.

    Args:
      directory: where config.json and tokenizer lie as well.
      single: the file; None: the only one, or the shards that the index names.

    Raises:
      ConvertError: no such directory, no safetensors in it, a broken or missing shard, or an index that names files
        outside the directory or tensors that its shards do not hold.
    """

    def __init__(self, directory: str | Path, single: str | None = None):
        self.where = Path(directory)
        if not self.where.is_dir():
            raise ConvertError(f"{self.where} is not a directory")
        self._headers: dict[str, Header] = {}
        if single is None and (self.where / INDEX).exists():
            self._file_of = read_index(self.where / INDEX, "safetensors")
            files = sorted(set(self._file_of.values()))
            check_index(self.where / INDEX, self._file_of, {file: set(self._header(file)) for file in files})
        else:
            single = single or self._single_file()
            self._file_of = dict.fromkeys(self._header(single), single)

    def _single_file(self) -> str:
        if (self.where / SINGLE).exists():
            return SINGLE
        found = sorted(path.name for path in self.where.glob("*.safetensors"))
        if len(found) == 1:
            return found[0]
        if found:
            raise ConvertError(f"{self.where} holds {', '.join(found)} but no {INDEX} that says which belong together")
        raise ConvertError(f"{self.where} holds neither {SINGLE} nor {INDEX}")

    def _header(self, file: str) -> Header:
        if file not in self._headers:
            self._headers[file] = read_header(self.where / file)
        return self._headers[file]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._file_of))

    def shape(self, key: str) -> tuple[int, ...]:
        return self._headers[self._file_of[key]][key].shape

    def dtype_name(self, key: str) -> str:
        return self._headers[self._file_of[key]][key].dtype

    def read(self, key: str) -> np.ndarray:
        file = self._file_of[key]
        return read_tensor(self.where / file, self._headers[file][key])
