"""The tensors of a directory of safetensors: one file, or shards with an index. Nothing is loaded until asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy before safetensors looks for it)
import numpy as np
from safetensors import SafetensorError, safe_open

from saisa_jax.convert.tables import ConvertError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")


class TensorDirectory:
    """The tensors of a checkpoint directory, by name; the files are memory-mapped and read tensor by tensor.

    Raises:
      ConvertError: no such directory, no safetensors in it, a broken or missing shard, or an index that names files
        outside the directory or tensors that its shards do not hold.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise ConvertError(f"{self.directory} is not a directory")
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        if (self.directory / INDEX).exists():
            self._read_index()
        else:
            single = self._single_file()
            self._where = dict.fromkeys(self._open(single).keys(), single)

    def _single_file(self) -> str:
        if (self.directory / SINGLE).exists():
            return SINGLE
        found = sorted(path.name for path in self.directory.glob("*.safetensors"))
        if len(found) == 1:
            return found[0]
        if found:
            raise ConvertError(
                f"{self.directory} holds {', '.join(found)} but no {INDEX} that says which belong together"
            )
        pickled = sorted(path.name for path in self.directory.glob("*.bin"))
        hint = f"; {', '.join(pickled)} would have to be saved as safetensors first" if pickled else ""
        raise ConvertError(f"{self.directory} holds neither {SINGLE} nor {INDEX}{hint}")

    def _read_index(self) -> None:
        path = self.directory / INDEX
        try:
            where = json.loads(path.read_text())["weight_map"]
            where = {str(key): str(file) for key, file in where.items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConvertError(f"{path} is not an index of safetensors shards: {error!r}") from error
        # A name with a separator could leave the directory, and no tool that writes shards makes one.
        outside = sorted({file for file in where.values() if not re.fullmatch(r"[^/\\\0:]+\.safetensors", file)})
        if outside:
            raise ConvertError(
                f"{path} names files that are not safetensors of its own directory: {', '.join(outside)}"
            )
        missing = sorted({file for file in where.values() if not (self.directory / file).is_file()})
        if missing:
            raise ConvertError(f"{path} names shards that are not there: {', '.join(missing)}")
        held = {file: set(self._open(file).keys()) for file in sorted(set(where.values()))}
        lacking = [f"{key} (said to be in {file})" for key, file in where.items() if key not in held[file]]
        unlisted = [f"{key} (in {file}, not in the index)" for file in held for key in held[file] if key not in where]
        if lacking or unlisted:
            raise ConvertError(f"{path} contradicts its shards:\n  " + "\n  ".join(sorted(lacking + unlisted)))
        self._where = where

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.directory / file
            try:
                self._files[file] = safe_open(path, framework="np")
            except (SafetensorError, OSError) as error:
                raise ConvertError(f"{path} is no whole safetensors file (truncated?): {error}") from error
        return self._files[file]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors, sorted."""
        return tuple(sorted(self._where))

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, from its file's header."""
        return tuple(self._slice(key).get_shape())

    def is_float(self, key: str) -> bool:
        """Whether a tensor holds floating-point numbers (quantised checkpoints hold bytes)."""
        return self._slice(key).get_dtype() in FLOATS

    def dtype_name(self, key: str) -> str:
        """The dtype in safetensors' spelling: F32, BF16, U8, ..."""
        return self._slice(key).get_dtype()

    def read(self, key: str) -> np.ndarray:
        """One tensor, in the dtype of its file."""
        return self._open(self._where[key]).get_tensor(key)

    def _slice(self, key: str) -> Any:
        return self._open(self._where[key]).get_slice(key)
