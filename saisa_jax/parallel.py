"""Devices: the mesh, and one table from logical axis names to its axes.

Parameters and activations name their dimensions (`embed`, `activation_batch`, ...); the table below says over which
axes of the mesh ("data", "fsdp", "tensor") each name is split. Everything runs under `jax.set_mesh` with Auto axes:
under a plain `with mesh:` linen's constraints silently do nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from saisa_jax.config import ATTENTION_IMPLS, ConfigError, MeshConfig, ModelConfig
from saisa_jax.errors import UserError
from saisa_jax.models.layers import on_platform

T = TypeVar("T")

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

Rules = tuple[tuple[str, Any], ...]

RULES: Rules = (
    # parameters
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("layers", None),
    ("norm", None),
    ("vision_embed", "fsdp"),
    ("vision_mlp", "tensor"),
    ("vision_heads", "tensor"),
    ("visual_hidden", "tensor"),
    ("visual_heads", "tensor"),
    # activations
    ("activation_batch", BATCH_AXES),
    ("activation_lookup", "data"),  # rows, while each device looks up its columns of the embedding table
    ("activation_length", None),
    ("activation_visual", None),
    ("activation_embed", None),
    ("activation_heads", "tensor"),
    ("activation_kv_heads", "tensor"),
    ("activation_mlp", "tensor"),
    ("activation_vocab", "tensor"),
)


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """The mesh over all devices (or those given).

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or `dcn` is not the number of their slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(1, len(devices) // rest)
    if math.prod(sizes) != len(devices):
        raise ConfigError(
            f"mesh data={sizes[0]} x fsdp={sizes[1]} x tensor={sizes[2]} needs {math.prod(sizes)} devices, and there "
            f"are {len(devices)}; set --config.mesh.data, .fsdp, .tensor, or --mesh=data=N,fsdp=N,tensor=N (one of "
            "them may be -1)"
        )
    if sizes[0] % config.dcn:
        raise ConfigError(f"mesh.data={sizes[0]} does not divide by mesh.dcn={config.dcn}: set --config.mesh.dcn")
    return Mesh(_arranged(devices, tuple(sizes), config.dcn), AXES, axis_types=(AxisType.Auto,) * 3)


def _arranged(devices: list[Any], sizes: tuple[int, ...], dcn: int) -> np.ndarray:
    """Devices in the shape of the mesh, so that neighbours on its inner axes are near each other.

    TPUs are arranged by their coordinates in the torus, with whole slices along the outermost part of `data`. GPUs and
    simulated devices are listed process by process, which has the same effect.
    """
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices != dcn:
        raise ConfigError(f"the devices come in {slices} slice(s) and mesh.dcn={dcn}: set --config.mesh.dcn={slices}")
    if dcn == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    within = (sizes[0] // dcn, *sizes[1:])
    return mesh_utils.create_hybrid_device_mesh(within, (dcn, 1, 1), devices, allow_split_physical_axes=True)


def make_rules(config: ModelConfig, mesh: Mesh) -> Rules:
    """The table for this model on this mesh: key/value heads that do not divide by `tensor` are replicated.

    Raises:
      ConfigError: query heads that do not divide by `tensor`, or another parameter dimension that does not divide.
    """
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    vision = config.vision
    of_projector = [("hidden_dim", config.projector_dim)]
    if config.projector.kind == "low_rank":
        of_projector.append(("rank", config.projector.rank))
    if config.projector.kind == "resampler":
        of_projector = [("num_heads", config.projector.num_heads)]
    if vision.kind == "vit":
        of_encoder = [("num_heads", vision.num_heads, "tensor"), ("mlp_dim", vision.mlp_dim, "tensor")]
    else:
        of_encoder = [("widths", width, axis) for width in vision.widths for axis in ("fsdp", "tensor")]
    for flag, size, axis, ways in (
        ("model.num_heads", config.num_heads, "tensor", tensor),
        ("model.vocab_size, padded,", config.padded_vocab_size, "tensor", tensor),
        ("model.mlp_dim", config.mlp_dim, "tensor", tensor),
        *((f"model.projector.{name}", size, "tensor", tensor) for name, size in of_projector),
        *((f"model.vision.{name}", size, axis, mesh.shape[axis]) for name, size, axis in of_encoder),
        ("model.embed_dim", config.embed_dim, "fsdp", fsdp),
        ("model.vision.embed_dim", vision.embed_dim, "fsdp", fsdp),
    ):
        if size % ways:
            raise ConfigError(
                f"{flag}={size} does not divide by mesh.{axis}={ways}; choose another mesh (--config.mesh, --mesh)"
            )
    whole = {"kv_heads", "activation_kv_heads"} if config.num_kv_heads % tensor else set()
    if whole:
        logging.info("%d key/value heads do not divide by mesh.tensor=%d: replicated", config.num_kv_heads, tensor)
    return tuple((name, None if name in whole else axes) for name, axes in RULES)


def attention_of(config: ModelConfig, mesh: Mesh) -> str:
    """The attention implementation of a model on a mesh: `model.attention_impl`, where that is `auto` the fused one
    that serves the model on these devices, else `xla`.

    Raises:
      ConfigError: the one that is asked for does not run on the mesh's devices.
    """
    device = mesh.devices.flat[0]
    platform = "gpu" if device.platform == "cuda" else device.platform
    if config.attention_impl == "auto":
        return fused_attention(config, platform, device)
    wanted = ATTENTION_IMPLS[config.attention_impl]
    if wanted not in (None, platform):
        others = [impl for impl, serves in ATTENTION_IMPLS.items() if serves in (None, platform)]
        raise ConfigError(
            f"model.attention_impl={config.attention_impl} runs on {wanted}, and the devices are {platform}: set "
            f"--config.model.attention_impl={' or '.join(others)}"
        )
    return config.attention_impl


def fused_attention(config: ModelConfig, platform: str, device: Any) -> str:
    """The fused implementation that serves a model on such a device (`models/attention*.py`), or `xla`."""
    if config.head_dim % 8:
        return "xla"
    if platform == "tpu":
        return "flash" if config.dtype in ("bfloat16", "float32") else "xla"
    # cuDNN's wants an NVIDIA GPU since Ampere; those of AMD are called gpu, too.
    recent = "NVIDIA" in device.device_kind and float(getattr(device, "compute_capability", "8.0")) >= 8
    fits = config.head_dim <= 256 and config.dtype in ("bfloat16", "float16")
    return "cudnn" if platform == "gpu" and recent and fits else "xla"


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Runs the body on the mesh, with logical names resolved by `rules`."""
    platform = mesh.devices.flat[0].platform
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules), on_platform(platform), broadcasting():
        yield


def broadcasting() -> contextlib.AbstractContextManager[None]:
    """Allows what models do (a norm's scale times its input), whatever `jax_numpy_rank_promotion` the caller set."""
    return jax.numpy_rank_promotion("allow")


def shardings_of(boxed: Any, mesh: Mesh, rules: Rules) -> Any:
    """The sharding of every leaf of a tree with logical axes (a boxed abstract tree).

    Raises:
      ConfigError: a leaf without logical axes, a name that the table does not know, or an axis of the mesh that two
        dimensions of a leaf use. Linen would silently replicate in all three cases.
    """
    is_boxed = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    for path, leaf in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_boxed):
        _check_axes(jax.tree_util.keystr(path, simple=True, separator="/"), leaf, rules)
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules)


def _check_axes(path: str, leaf: Any, rules: Rules) -> None:
    if not isinstance(leaf, nn.LogicallyPartitioned):
        raise ConfigError(
            f"{path} has no logical axes; name them where the parameter is made (models/layers.py: named)"
        )
    table = dict(rules)
    names = [name for name in leaf.names if name is not None]
    seen = f"{path} has the logical axes {leaf.names}"
    unknown = [name for name in names if name not in table]
    if unknown:
        raise ConfigError(f"{seen}, and {', '.join(unknown)} is not in the table of parallel.py: {', '.join(table)}")
    wanted = [axis for name in names for axis in jax.tree.leaves(table[name])]
    twice = sorted({axis for axis in wanted if wanted.count(axis) > 1})
    if twice:
        used = ", ".join(f"{name} -> {table[name]}" for name in names)
        raise ConfigError(f"{seen}, which the table of parallel.py splits over mesh.{twice[0]} more than once: {used}")


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def own_rows(mesh: Mesh, rows: int) -> tuple[int, ...]:
    """The rows of a batch that this process's devices hold, and which it therefore reads.

    Processes along the axis "tensor" hold the same rows.
    """
    spans: Any = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return tuple(sorted({row for (span,) in spans for row in range(*span.indices(rows))}))


def to_device(batch: Any, mesh: Mesh, rows: int | None = None) -> Any:
    """A batch (numpy), as global arrays on the mesh.

    Args:
      batch: this process's `own_rows`, or the whole batch, the same in every process.
      mesh: of all processes.
      rows: of the whole batch, where `batch` holds the process's own; None: it is the whole one.
    """
    sharding = batch_sharding(mesh)
    own = own_rows(mesh, rows) if rows is not None else None

    def place(x: Any) -> Any:
        x = np.asarray(x)
        total = len(x) if rows is None else rows

        def piece(index: Any) -> np.ndarray:
            first, end, _ = index[0].indices(total)
            start = first if own is None else own.index(first)
            return x[start : start + end - first]

        return jax.make_array_from_callback((total, *x.shape[1:]), sharding, piece)

    return jax.tree.map(place, batch)


# --- processes -------------------------------------------------------------------------------------------------------


class OtherProcessError(UserError, RuntimeError):
    """Another process has failed."""


def together(act: Callable[[], T]) -> T:
    """The result of `act`, which every process calls here; where it fails in one, it fails in all.

    Raises:
      Exception: this process's own.
      OtherProcessError: another one has failed.
    """
    if jax.process_count() == 1:
        return act()
    failure, result = None, None
    try:
        result = act()
    except Exception as error:  # whatever it is, the others wait
        failure = error
    failed = np.flatnonzero(multihost_utils.process_allgather(np.asarray(failure is not None)))
    if failure is not None:
        raise failure
    if len(failed):
        raise OtherProcessError(f"process {failed[0]} cannot continue; its own log says why")
    return result  # pyright: ignore[reportReturnType]


def agree(value: int, what: str) -> None:
    """Raises ConfigError in every process unless all of them come with the same number of 32 bits."""
    if jax.process_count() > 1:
        seen = np.asarray(multihost_utils.process_allgather(np.asarray(value, np.uint32)))
        if len(np.unique(seen)) > 1:
            raise ConfigError(f"the processes have different {what}: start the same command with the same files on all")


def least(value: int) -> int:
    """The smallest number of all processes, rounded down to a multiple of 2**20 where there are several."""
    if jax.process_count() == 1:
        return value
    return int(np.min(multihost_utils.process_allgather(np.asarray(value >> 20, np.int32)))) << 20


def from_first(value: np.ndarray) -> np.ndarray:
    """Process 0's array, in every process; the others give one of the same shape."""
    return value if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(value))
