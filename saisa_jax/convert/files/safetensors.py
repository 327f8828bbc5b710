"""One safetensors file: its header, its tensors one by one, and writing it so.

The library's own reader maps the file, and its writer wants all tensors at once; both would count as memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from saisa_jax.convert.rows import ConvertError

# The library's spelling of dtypes, and numpy's.
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "I64": np.int64, "I32": np.int32,
        "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
        "BOOL": np.bool_, "C64": np.complex64,
    }.items()
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")  # those of eight bits come with scales, that is, quantised


@dataclass(frozen=True)
class Entry:
    """Where a tensor stands in its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file


Header = Mapping[str, Entry]


def read_header(path: Path) -> Header:
    """What a file holds, by name.

    Raises:
      ConvertError: no whole safetensors file, or a dtype that is not known here.
    """
    try:
        with safe_open(path, framework="np"):  # checks that the header is sound and the file as long as it says
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            raw = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ConvertError(f"{path} is no whole safetensors file (truncated?): {error}") from error
    raw.pop("__metadata__", None)
    unknown = sorted({entry["dtype"] for entry in raw.values()} - set(DTYPES))
    if unknown:
        raise ConvertError(f"{path} holds tensors of dtype {', '.join(unknown)}; known: {', '.join(DTYPES)}")
    return {
        name: Entry(entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in raw.items()
    }


def read_tensor(path: Path, entry: Entry) -> np.ndarray:
    """One tensor of a file.

    Raises:
      ConvertError: the file cannot be read, or has become shorter.
    """
    count = math.prod(entry.shape)
    try:
        array = np.fromfile(path, DTYPES[entry.dtype], count=count, offset=entry.start)
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error}") from error
    if array.size != count:
        raise ConvertError(f"{path} is no whole safetensors file (truncated while it was read?)")
    return array.reshape(entry.shape)


def write_file(
    path: Path,
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    read: Callable[[str], np.ndarray],
) -> None:
    """Writes a file tensor by tensor.

    Args:
      tensors: (name, dtype, shape) of each.
      read: gives a tensor of that dtype and shape when its turn comes.
    """
    # The widest first, so that every tensor is aligned to its elements.
    order = sorted(tensors, key=lambda tensor: -DTYPES[tensor[1]].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for this entry
    position = 0
    for name, dtype, shape in order:
        end = position + nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little"))
        file.write(content)
        for name, dtype, shape in order:
            array = np.ascontiguousarray(read(name))
            assert array.dtype == DTYPES[dtype] and array.shape == tuple(shape), name
            file.write(array.reshape(-1).view(np.uint8).data)


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * DTYPES[dtype].itemsize
