"""What a stored tree is: the path, shape, dtype and checksum of every leaf, and how two such accounts differ.

A checksum is a sum, modulo 2^32, over the elements of

    mix(bits + mix(index))

where `bits` is the element's bit pattern, `index` its place in the flattened array and `mix` an invertible scrambling
of 32 bits. It is exact (integers have no rounding, and their sum no order), so it is the same on every mesh and
backend; any one changed element always changes it, and swapped elements do except with probability 2^-32.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, UInt32

# How `checksums` is computed; a stored account under another name is refused.
ALGORITHM = "mix32"

PIECE_BYTES = 2**27
HOST_BYTES = 2**20
_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes of an element


def flatten(tree: Any) -> dict[str, Any]:
    """A tree of any nodes as {"trainable/layers/attn/q_proj/kernel": leaf}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten_dict(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": leaf} as nested dictionaries."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def checksums(tree: Any) -> dict[str, int]:
    """The checksum of every leaf, by path; of a large one computed on its own devices, however it is sharded.

    Args:
      tree: arrays of float32, bfloat16, float16, integers of up to 32 bits, or bool; any shape, empty ones too.

    Raises:
      TypeError: a leaf of another dtype, by its path.
    """
    flat = flatten(tree)
    for path, leaf in flat.items():
        dtype = getattr(leaf, "dtype", None)
        if not _supported(dtype):
            raise TypeError(
                f"{path} is {type(leaf).__name__} of dtype {dtype}; a checkpoint holds arrays of float32, bfloat16, "
                "float16, bool, or integers of 8, 16 or 32 bits"
            )
    small = jax.device_get({path: leaf for path, leaf in flat.items() if _is_small(leaf)})
    sums: dict[str, Any] = {path: [_checksum_on_host(leaf)] for path, leaf in small.items()}
    for path, leaf in flat.items():
        if path in small:
            continue
        with _own_mesh(leaf):
            sums[path] = [_checksum(leaf, start, rows) for start, rows in _pieces(leaf)]
        if len(sums[path]) > 1:  # a large leaf: done before the next one starts
            jax.block_until_ready(sums[path])
    sums = jax.device_get(sums)
    return {path: sum(map(int, sums[path])) % 2**32 for path in flat}


def _is_small(leaf: Any) -> bool:
    """Whether it is summed on the host, which compiles nothing: a program is one of the leaf's shape."""
    return leaf.nbytes <= HOST_BYTES and getattr(leaf, "is_fully_addressable", True)


def _checksum_on_host(x: np.ndarray) -> np.uint32:
    bits = np.ascontiguousarray(x).reshape(-1).view(f"uint{8 * x.dtype.itemsize}").astype(np.uint32)
    index = np.arange(bits.size, dtype=np.uint32)
    return np.sum(_mix(bits + _mix(index + np.uint32(0x9E3779B9))), dtype=np.uint32)


def _pieces(leaf: Any) -> list[tuple[int, int]]:
    """(start, length) along the first axis; a large leaf of one device is summed in pieces, to save memory."""
    if leaf.ndim == 0 or leaf.nbytes <= PIECE_BYTES or len(getattr(leaf, "devices", tuple)()) > 1:
        return [(0, leaf.shape[0] if leaf.ndim else 1)]
    rows = max(1, leaf.shape[0] * PIECE_BYTES // leaf.nbytes)
    return [(start, min(rows, leaf.shape[0] - start)) for start in range(0, leaf.shape[0], rows)]


def _supported(dtype: Any) -> bool:
    if dtype is None or not (jnp.issubdtype(dtype, np.number) or dtype == np.bool_):
        return False
    if dtype == np.bool_:
        return True
    info = jnp.iinfo(dtype) if jnp.issubdtype(dtype, np.integer) else jnp.finfo(dtype)
    return info.bits in (8, 16, 32) and not jnp.issubdtype(dtype, np.complexfloating)


def _own_mesh(leaf: Any) -> contextlib.AbstractContextManager[Any]:
    """The leaf's own mesh as the current one: under another mesh, jit refuses arrays that live on fewer devices."""
    if not isinstance(leaf, jax.Array):
        return contextlib.nullcontext()
    mesh = leaf.sharding.mesh if isinstance(leaf.sharding, NamedSharding) else None
    return jax.set_mesh(mesh if isinstance(mesh, Mesh) else Mesh(np.asarray([*leaf.sharding.device_set]), ("all",)))


@functools.partial(jax.jit, static_argnums=2)
def _checksum(x: Array, start: Any, rows: int) -> UInt32[Array, ""]:
    """The part of the sum that comes from x[start : start + rows]."""
    first = jnp.zeros((), jnp.uint32)
    if x.ndim and rows != x.shape[0]:
        x = jax.lax.dynamic_slice_in_dim(x, start, rows)
        first = jnp.uint32(start) * jnp.uint32(math.prod(x.shape[1:]) % 2**32)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize]).astype(jnp.uint32)
    # The flat index from one iota for each axis: a reshape would gather a sharded array.
    index, stride = first, 1
    for axis in reversed(range(x.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(_mix(bits + _mix(index + jnp.uint32(0x9E3779B9))), dtype=jnp.uint32)


def _mix(x: Any) -> Any:
    """The finalizer of MurmurHash3: invertible, and every input bit affects every output bit."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def describe(tree: Any) -> dict[str, dict[str, Any]]:
    """{path: {"shape", "dtype"}} of concrete or abstract leaves, JSON-ready."""
    return {
        path: {"shape": list(leaf.shape), "dtype": np.dtype(leaf.dtype).name} for path, leaf in flatten(tree).items()
    }


def account(tree: Any) -> dict[str, dict[str, Any]]:
    """{path: {"shape", "dtype", "checksum"}}, JSON-ready: the account that is stored beside a tree."""
    sums = checksums(tree)
    return {path: {**entry, "checksum": sums[path]} for path, entry in describe(tree).items()}


def differences(stored: Mapping[str, Any], expected: Mapping[str, Any], dtypes: bool = True) -> list[str]:
    """Every path in which two accounts differ, with what each holds; without `dtypes` only shapes count."""
    lines = [f"{path}: missing in the checkpoint" for path in expected if path not in stored]
    lines += [f"{path}: unexpected in the checkpoint" for path in stored if path not in expected]
    for path in expected:
        if path not in stored:
            continue
        for what in ("shape", "dtype") if dtypes else ("shape",):
            seen, wanted = stored[path][what], expected[path][what]
            if seen != wanted:
                lines.append(f"{path}: {what} {_show(seen)} in the checkpoint, {_show(wanted)} expected")
    return lines


def _show(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, list) else str(value)


def damaged(tree: Any, stored: Mapping[str, Any]) -> list[str]:
    """The paths of the leaves whose checksum is not the stored one."""
    return [path for path, value in checksums(tree).items() if value != stored[path]["checksum"]]


# --- small JSON documents that carry their own checksum --------------------------------------------------------------


def seal(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document as JSON will return it, with its own checksum under "crc32"."""
    plain = json.loads(json.dumps(document))
    return {**plain, "crc32": _crc32(plain)}


def unseal(document: Any) -> dict[str, Any]:
    """The document without its checksum.

    Raises:
      ValueError: no checksum in it, or not the right one.
    """
    if not isinstance(document, dict) or "crc32" not in document:
        raise ValueError("it has no checksum of its own")
    plain = {key: value for key, value in document.items() if key != "crc32"}
    if document["crc32"] != _crc32(plain):
        raise ValueError("its own checksum does not fit its content")
    return plain


def _crc32(document: Any) -> int:
    return zlib.crc32(json.dumps(document, sort_keys=True).encode())
