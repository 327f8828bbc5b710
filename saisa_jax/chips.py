"""Accelerators by name: what a chip can do. Plans look them up by name, runs by JAX's device kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """What a chip can do, according to its vendor.

    Attributes:
      flops: dense bfloat16 FLOP/s.
      hbm: bytes of memory that a program may use.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s that a chip receives over all its links to its neighbours (ICI, NVLink) together: half of
        the "bidirectional" figure.
      axes: dimensions of a topology; 1 for GPUs, which are all connected to each other.
      example: a topology.
      source: where the figures are from.
      kinds: `jax.Device.device_kind` of chips with these FLOP/s; their memory may be another.
      devices: JAX devices of a chip, as a plan's compiler describes it.
    """

    flops: float
    hbm: float
    hbm_bandwidth: float
    link_bandwidth: float
    axes: int
    example: str
    source: str
    kinds: tuple[str, ...]
    devices: int = 1


_TPU_PAGES = "docs.cloud.google.com/tpu/docs/"
_A100 = ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB", "NVIDIA A100 80GB PCIe", "NVIDIA A100-PCIE-40GB")

# HBM of TPUs: what libtpu 0.0.42 itself says is available when a program is too large for it. Kinds of TPUs: those of
# jax/_src/pallas/mosaic/tpu_info.py. An H100 on PCIe and the NVL boards are slower than those on SXM.
CHIPS: dict[str, Chip] = {
    "v4": Chip(275e12, 30.75 * GIB, 1200e9, 300e9, 3, "2x2x4", _TPU_PAGES + "v4", ("TPU v4",)),
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 200e9, 2, "4x4", _TPU_PAGES + "v5e", ("TPU v5 lite", "TPU v5e")),
    "v5p": Chip(459e12, 95.74 * GIB, 2765e9, 600e9, 3, "2x2x4", _TPU_PAGES + "v5p", ("TPU v5", "TPU v5p")),
    "v6e": Chip(918e12, 31.25 * GIB, 1638e9, 400e9, 2, "4x4", _TPU_PAGES + "v6e", ("TPU v6 lite", "TPU v6e")),
    "tpu7x": Chip(2307e12, 2 * 94.75 * GIB, 7380e9, 600e9, 3, "2x2x1", _TPU_PAGES + "tpu7x", ("TPU7x",), devices=2),
    # SXM boards; 0.9 of the memory, for the driver and the allocator.
    "a100": Chip(312e12, 0.9 * 80 * GIB, 2039e9, 300e9, 1, "8", "NVIDIA A100 80GB datasheet", _A100),
    "h100": Chip(
        989e12, 0.9 * 80 * GIB, 3350e9, 450e9, 1, "8", "NVIDIA H100 SXM datasheet", ("NVIDIA H100 80GB HBM3",)
    ),
    "h200": Chip(989e12, 0.9 * 141 * GIB, 4800e9, 450e9, 1, "8", "NVIDIA H200 SXM datasheet", ("NVIDIA H200",)),
}


def peak_flops(devices: Sequence[Any]) -> float | None:
    """bfloat16 FLOP/s of JAX devices together; None if one of them is of an unknown kind, such as a CPU.

    A TPU chip may show as one device or as two (v4 by its setting, TPU7x always): chips are told apart by their
    coordinates, and each is counted once.
    """
    by_kind = {kind: chip.flops for chip in CHIPS.values() for kind in chip.kinds}
    chips = {_place(device): by_kind.get(device.device_kind) for device in devices}
    peaks = [flops for flops in chips.values() if flops is not None]
    return sum(peaks) if len(peaks) == len(chips) else None


def memory_of(device: Any) -> float | None:
    """Bytes that a program may use of a JAX device: what it says itself, or what its kind has; None: unknown."""
    by_kind = {kind: chip.hbm / chip.devices for chip in CHIPS.values() for kind in chip.kinds}
    try:
        says = device.memory_stats() or {}
    except RuntimeError:  # it is not there: a plan's
        says = {}
    return says.get("bytes_limit") or by_kind.get(device.device_kind)


def _place(device: Any) -> tuple[Any, ...]:
    """The same for devices of one chip."""
    if device.platform != "tpu":
        return (device.id,)
    return (getattr(device, "slice_index", 0), *device.coords)
