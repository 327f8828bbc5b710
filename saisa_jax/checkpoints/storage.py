"""What runs' checkpoints and finished models have in common: errors, formats, and trees as Orbax stores them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

from saisa_jax.checkpoints.checksums import ALGORITHM, flatten, unflatten_dict
from saisa_jax.errors import UserError

T = TypeVar("T")

CHUNK_BYTES = 2**23
MORE_AT_ONCE = 2**25  # bytes
FORMAT = 1  # of what is stored here; raised when older programs could not read it


class CheckpointError(UserError, RuntimeError):
    """Something that cannot be saved or restored; the message says what, where and why."""


class DamagedError(CheckpointError):
    """Stored files that cannot be read, or are not what was written."""


def versions() -> dict[str, str]:
    """The libraries that wrote a checkpoint, for later readers."""
    return {name: importlib.metadata.version(name) for name in ("jax", "flax", "orbax-checkpoint", "grain")}


def header() -> dict[str, Any]:
    """The first fields of every stored account."""
    return {"format": FORMAT, "algorithm": ALGORITHM, "versions": versions()}


def check_format(document: Mapping[str, Any], where: str) -> None:
    """Refuses files in a format that this version does not read."""
    seen, known = (document.get("format"), document.get("algorithm")), (FORMAT, ALGORITHM)
    if seen != known:
        raise CheckpointError(
            f"{where} is of format {seen}, and this version reads {known}; it was written by {document.get('versions')}"
        )


def stored_tree(tree: Any) -> dict[str, Any]:
    """A tree as nested dictionaries without empty arrays, which Orbax cannot store (the account can)."""
    return unflatten_dict({path: leaf for path, leaf in flatten(tree).items() if 0 not in leaf.shape})


def write_tree(path: epath.Path, tree: Any) -> None:
    """Writes arrays, and returns when they are there; Orbax holds copies of one large array at a time.

    An array is stored in chunks, so that whoever holds a part of it reads little more than that part: of a 7B imported
    on one host, each of 16 hosts reads a sixteenth.
    """
    stored = stored_tree(tree)
    chunked = jax.tree.map(lambda leaf: ocp.SaveArgs(chunk_byte_size=max(CHUNK_BYTES, leaf.dtype.itemsize)), stored)
    largest = max((leaf.nbytes for leaf in jax.tree.leaves(stored)), default=0)
    at_once = (largest + MORE_AT_ONCE) / 10**9  # the largest has to fit, and copies of small ones beside it
    handler = ocp.StandardCheckpointHandler(save_concurrent_gb=at_once)  # pyright: ignore[reportArgumentType]
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, args=ocp.args.StandardSave(stored, chunked))


def template(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: what to restore}; leaves without a sharding go to the first local device."""
    place = SingleDeviceSharding(jax.local_devices()[0])
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or place)
        for path, leaf in flatten(tree).items()
    }


def complete(restored: Any, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """{path: array} in the order of `wanted`, empty arrays filled in."""
    flat = flatten(restored)
    return {
        path: flat[path] if path in flat else jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        for path, leaf in wanted.items()
    }


def read(what: str, act: Callable[[], T]) -> T:
    """The result of `act`; any failure becomes a DamagedError."""
    try:
        return act()
    except Exception as error:  # Orbax raises almost anything
        raise DamagedError(f"{what} cannot be read: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """An error in one line; TensorStore appends pages."""
    lines = str(error).partition(" See full TensorStore details")[0].strip().removesuffix(".").splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
