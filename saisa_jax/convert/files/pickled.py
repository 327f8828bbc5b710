"""A directory of `.bin` files: what torch.save has written, read as plain tensors and nothing else, without torch.

Such a file is a zip: `data.pkl`, a pickle that describes the tensors, and their bytes, a file each. A pickle can name
any function and have it called; here the names that tensors need are known, and any other one is refused before it is
looked up, so that no code of the file is run.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saisa_jax.convert.files.safetensors import DTYPES
from saisa_jax.convert.files.tensors import Directory, check_index, read_index
from saisa_jax.convert.rows import ConvertError

PICKLED_INDEX = "pytorch_model.bin.index.json"
PICKLED_SINGLE = "pytorch_model.bin"
# torch's classes of storages -> safetensors' spelling of their dtypes.
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class _Storage:
    """Bytes of a file that tensors are views of."""

    dtype: str
    start: int  # in the file
    count: int  # elements


@dataclass(frozen=True)
class PickledTensor:
    """Where a tensor stands in its file."""

    storage: _Storage
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements

    @property
    def span(self) -> int:
        """Elements from its first to its last one."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))


class _Unpickler(pickle.Unpickler):
    """Reads descriptions of tensors, and refuses everything else."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self._path, self._archive, self._root = path, archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) not in known:
            raise ConvertError(
                f"{self._path} is no file of tensors alone: it asks for {module}.{name}, and no code of a file is run"
            )
        return known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, count = pid
        entry = self._archive.getinfo(f"{self._root}/data/{key}")
        if entry.compress_type != zipfile.ZIP_STORED or count * DTYPES[dtype].itemsize > entry.file_size:
            raise ValueError(f"the bytes of data/{key} are compressed or too few")
        with self._path.open("rb") as file:
            file.seek(entry.header_offset)
            header = file.read(30)  # of the zip's own, before its name and an extra field that pads
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return _Storage(dtype, entry.header_offset + 30 + names, count)


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: Sequence[int], strides: Sequence[int], *_: Any
) -> PickledTensor:
    tensor = PickledTensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))
    if min((tensor.offset, *tensor.shape, *tensor.strides)) < 0 or tensor.offset + tensor.span > storage.count:
        raise ValueError("a tensor goes beyond its bytes")
    return tensor


def read_pickled_header(path: Path) -> dict[str, PickledTensor]:
    """What a file of torch.save holds, by name.

    Raises:
      ConvertError: no whole file of torch 1.6 or later, or one that holds anything else than named tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError("it holds no data.pkl")
            root = pickles[0].split("/")[0]
            if f"{root}/byteorder" in archive.namelist() and archive.read(f"{root}/byteorder") != b"little":
                raise ValueError("its numbers are big-endian")
            held = _Unpickler(path, archive, root).load()
    except ConvertError:
        raise
    except Exception as error:  # a broken pickle raises almost anything
        raise ConvertError(
            f"{path} is no whole file that torch 1.6 or later has saved ({error or type(error).__name__}); if it is an "
            "older one, save it again: torch.save(torch.load(FILE, weights_only=True), FILE)"
        ) from error
    if not isinstance(held, Mapping) or not all(isinstance(tensor, PickledTensor) for tensor in held.values()):
        raise ConvertError(f"{path} holds something else than named tensors")
    return {str(name): tensor for name, tensor in held.items()}


def read_pickled_tensor(path: Path, tensor: PickledTensor) -> np.ndarray:
    """One tensor of a file, in memory of its own.

    Raises:
      ConvertError: the file cannot be read, or has become shorter.
    """
    dtype = DTYPES[tensor.storage.dtype]
    start = tensor.storage.start + tensor.offset * dtype.itemsize
    try:
        flat = np.fromfile(path, dtype, count=tensor.span, offset=start)
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error}") from error
    if flat.size != tensor.span:
        raise ConvertError(f"{path} is no whole file (truncated while it was read?)")
    if flat.size == math.prod(tensor.shape) and _in_order(tensor):
        return flat.reshape(tensor.shape)
    strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
    return np.array(np.lib.stride_tricks.as_strided(flat, tensor.shape, strides))


def _in_order(tensor: PickledTensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


class PickledDirectory(Directory):
    """The tensors of one `.bin` file of a directory, or of shards with an index.

    Args:
      directory: where config.json and tokenizer lie as well.
      single: the file; None: `pytorch_model.bin`, or the shards that its index names.

    Raises:
      ConvertError: no such files, broken ones, or pickles of anything but tensors.
    """

    def __init__(self, directory: str | Path, single: str | None = None):
        self.where = Path(directory)
        index = self.where / PICKLED_INDEX
        self._headers: dict[str, dict[str, PickledTensor]] = {}
        if single is None and index.exists():
            self._file_of = read_index(index, "bin")
            self._headers = {file: read_pickled_header(self.where / file) for file in sorted({*self._file_of.values()})}
            check_index(index, self._file_of, {file: set(header) for file, header in self._headers.items()})
        else:
            file = single or PICKLED_SINGLE
            if not (self.where / file).is_file():
                raise ConvertError(f"{self.where} holds no {file}")
            self._headers = {file: read_pickled_header(self.where / file)}
            self._file_of = dict.fromkeys(self._headers[file], file)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._file_of))

    def shape(self, key: str) -> tuple[int, ...]:
        return self._headers[self._file_of[key]][key].shape

    def dtype_name(self, key: str) -> str:
        return self._headers[self._file_of[key]][key].storage.dtype

    def read(self, key: str) -> np.ndarray:
        file = self._file_of[key]
        return read_pickled_tensor(self.where / file, self._headers[file][key])
