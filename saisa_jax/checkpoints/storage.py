"""What runs' checkpoints and finished models have in common: errors, formats, and trees as Orbax stores them."""

from __future__ import annotations

import functools
import importlib.metadata
import logging as python_logging
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.sharding import SingleDeviceSharding

from saisa_jax.checkpoints.checksums import ALGORITHM, flatten, unflatten_dict
from saisa_jax.errors import UserError

T = TypeVar("T")

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
    """Writes arrays, and returns when they are there; Orbax holds copies of one large array at a time."""
    _silence_abandoned_reads()  # and writes
    stored = stored_tree(tree)
    largest = max((leaf.nbytes for leaf in jax.tree.leaves(stored)), default=0)
    handler = ocp.StandardCheckpointHandler(save_concurrent_gb=math.ceil(largest / 1e9) or 1)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, args=ocp.args.StandardSave(stored))


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
    _silence_abandoned_reads()
    try:
        return act()
    except Exception as error:  # Orbax raises almost anything
        raise DamagedError(f"{what} cannot be read: {first_line(error)}") from error


@functools.cache
def _silence_abandoned_reads() -> None:
    """When one of Orbax's reads fails, the others are dropped, and each of them prints pages; not any more."""
    hook = sys.unraisablehook

    def quiet(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        abandoned = "orbax" in code.co_filename if code else str(unraisable.exc_value) == "Event loop is closed"
        if not abandoned:
            hook(unraisable)

    sys.unraisablehook = quiet


def first_line(error: Exception) -> str:
    """An error in one line; TensorStore appends pages."""
    lines = str(error).partition(" See full TensorStore details")[0].strip().removesuffix(".").splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _quiet_absl(record: python_logging.LogRecord) -> bool:
    """Lets Orbax's warnings and errors pass, not its dozens of lines about every save; tracebacks are ours to raise."""
    if "orbax" in record.pathname:
        record.exc_info = None
        return record.levelno >= python_logging.WARNING
    return True


def _quiet_asyncio(record: python_logging.LogRecord) -> bool:
    """Drops the pages about Orbax's other reads when one of them has failed; that one is raised."""
    return not (record.exc_info and "exception was never retrieved" in record.getMessage())


logging.get_absl_logger().addFilter(_quiet_absl)
python_logging.getLogger("asyncio").addFilter(_quiet_asyncio)
