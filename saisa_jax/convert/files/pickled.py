"""A directory of `.bin` files, which are pickles: read only when asked for, and only as plain tensors."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from saisa_jax.convert.files.safetensors import NAMES
from saisa_jax.convert.files.tensors import Directory, check_index, read_index
from saisa_jax.convert.rows import ConvertError

PICKLED_INDEX = "pytorch_model.bin.index.json"
PICKLED_SINGLE = "pytorch_model.bin"
REOPEN_BYTES = 2**29  # torch maps the file; what was read stays mapped until it is opened anew


class PickledDirectory(Directory):
    """The tensors of `pytorch_model.bin`, or of shards with an index.

    Raises:
      ConvertError: torch is missing, no such files, broken ones, or pickles of anything but tensors.
    """

    def __init__(self, directory: str | Path):
        self.where = Path(directory)
        if (self.where / PICKLED_INDEX).exists():
            self._file_of = read_index(self.where / PICKLED_INDEX, "bin")
            files = sorted(set(self._file_of.values()))
        elif (self.where / PICKLED_SINGLE).exists():
            self._file_of, files = {}, [PICKLED_SINGLE]
        else:
            raise ConvertError(f"{self.where} holds neither safetensors nor {PICKLED_SINGLE} nor {PICKLED_INDEX}")
        self._specs: dict[str, tuple[tuple[int, ...], str]] = {}
        held = {}
        for file in files:
            tensors = self._load(file)
            held[file] = set(tensors)
            self._specs |= {key: (tuple(tensor.shape), _dtype_name(tensor)) for key, tensor in tensors.items()}
        if self._file_of:
            check_index(self.where / PICKLED_INDEX, self._file_of, held)
        else:
            self._file_of = dict.fromkeys(held[PICKLED_SINGLE], PICKLED_SINGLE)
        self._open: tuple[str, Any] = ("", None)
        self._read = 0

    def _load(self, file: str) -> dict[str, Any]:
        try:
            import torch  # pyright: ignore[reportMissingImports]  (an option)
        except ImportError as error:
            raise ConvertError("reading .bin files takes torch: pip install torch") from error
        path = self.where / file
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConvertError(f"{path} is no file of tensors alone that torch can read: {reason}") from error
        if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise ConvertError(f"{path} holds something else than named tensors")
        return tensors

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._file_of))

    def shape(self, key: str) -> tuple[int, ...]:
        return self._specs[key][0]

    def dtype_name(self, key: str) -> str:
        return self._specs[key][1]

    def read(self, key: str) -> np.ndarray:
        file = self._file_of[key]
        if self._open[0] != file or self._read > REOPEN_BYTES:
            self._open, self._read = (file, self._load(file)), 0
        array = np.array(_numpy(self._open[1][key]))  # a copy: the file's pages are let go
        self._read += array.nbytes
        return array


def _numpy(tensor: Any) -> np.ndarray:
    import torch  # pyright: ignore[reportMissingImports]  (an option)

    if tensor.dtype == torch.bfloat16:  # numpy has none of its own
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _dtype_name(tensor: Any) -> str:
    return NAMES[_numpy(tensor.reshape(-1)[:0]).dtype]
