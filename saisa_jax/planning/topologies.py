"""Slices of chips by name, and their devices to compile for, without having any."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from saisa_jax.chips import CHIPS, Chip
from saisa_jax.config import ConfigError
from saisa_jax.errors import did_you_mean


@dataclass(frozen=True)
class Topology:
    """A slice of chips: "v5e:4x4"; several that a network joins: "v5e:4x4*2"; or one node of GPUs: "h100:8".

    Devices come slice by slice, so that the mesh's first axis, `data`, is the one that goes from slice to slice.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def on_gpu(self) -> bool:
        return self.chip.axes == 1


def parse(name: str) -> Topology:
    """The topology of that name: "v5e:4x4", "v5p:2x2x4", "v5e:4x4*2", "h100:8".

    Raises:
      ConfigError: no such chip, with the nearest ones, or a shape that it does not come in.
    """
    kind, _, rest = name.partition(":")
    shape, several, slices = rest.partition("*")
    if kind not in CHIPS:
        hint = did_you_mean(kind, CHIPS, n=2, otherwise=f"; known chips: {', '.join(CHIPS)}")
        raise ConfigError(f"--topology={name!r} names no known chip{hint}")
    chip = CHIPS[kind]
    if not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (chip.axes - 1), shape):
        axes = "a number of GPUs" if chip.axes == 1 else f"a shape of {chip.axes} sides"
        raise ConfigError(f"--topology={name!r}: {kind} takes {axes}, for example {kind}:{chip.example}")
    if several and (chip.axes == 1 or not re.fullmatch(r"[1-9]\d*", slices)):
        what = f"{kind} is planned in one node" if chip.axes == 1 else f"*{slices} is no number of slices"
        raise ConfigError(f"--topology={name!r}: {what}; for example {kind}:{shape}{'' if chip.axes == 1 else '*2'}")
    return Topology(name, kind, tuple(int(side) for side in shape.split("x")), int(slices or 1))


def devices(topology: Topology) -> list[Any]:
    """Devices to compile for. They hold no array and run nothing.

    Raises:
      ConfigError: the compiler is not installed, or does not know the shape.
    """
    return _gpus(topology) if topology.on_gpu else _tpus(topology)


_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no TPU to ask
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nor one to share
    # What it would have been asked for. The topology decides; without these libtpu complains at length.
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}


def _tpus(topology: Topology) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"--topology={topology.name} needs the TPU compiler: pip install -r requirements-tpu.txt")
    for name, value in _NO_TPU_HERE.items():
        os.environ.setdefault(name, value)
    more: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if topology.chips == 1 else {}
    if topology.kind == "v4":
        more["chip_config_name"] = "megacore"  # a chip's two cores as one device, as on real ones
    if topology.slices > 1:
        more["num_slices"] = topology.slices
    return _describe(topology.name, "tpu", topology_name=topology.name.partition("*")[0], **more)


def _gpus(topology: Topology) -> list[Any]:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise ConfigError(f"--topology={topology.name} needs the compiler for GPUs (4 GB): pip install 'jax[cuda13]'")
    return _describe(
        topology.name, "cuda", topology_name="", target_config=_target(topology), topology=f"1x1x{topology.chips}"
    )


def _target(topology: Topology) -> str:
    """The description of a GPU that XLA compiles for (a GpuTargetConfigProto)."""
    chip, hopper = topology.chip, topology.kind in ("h100", "h200")
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": 233472 if hopper else 167936,
        "shared_memory_per_block_optin": 232448 if hopper else 166912,
        "threads_per_core_limit": 2048,
        "core_count": 132 if hopper else 108,
        "fpus_per_core": 128 if hopper else 64,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": int(chip.hbm_bandwidth),
        "l2_cache_size": 52428800 if hopper else 41943040,
        "clock_rate_ghz": 1.98 if hopper else 1.41,
        "device_memory_size": int(chip.hbm / 0.9),
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
    }
    fields = " ".join(f"{name}: {value}" for name, value in device.items())
    capability = f"cuda_compute_capability {{ major: {9 if hopper else 8} minor: 0 }}"
    versions = " ".join(f'{kind}_version: "13.0.0"' for kind in ("driver", "runtime", "compile_time_toolkit"))
    return (
        f'gpu_device_info {{ {fields} {capability} device_vendor: "NVIDIA Corporation" {versions} '
        f'dnn_version: "9.10.0" }} platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} '
        f'device_description_str: "{chip.kinds[0]}"'
    )


def _describe(name: str, platform: str, **arguments: Any) -> list[Any]:
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform=platform, **arguments).devices)
    except Exception as error:  # whatever a plugin of another maker raises
        raise ConfigError(f"--topology={name} was refused by its compiler: {str(error).strip()}") from error
