"""What JAX calls a device, and what it can do."""

from types import SimpleNamespace

import jax
import pytest

from saisa_jax.chips import CHIPS, GIB, memory_of, peak_flops


def tpu(kind: str, *coords: int, core: int = 0, slice_index: int = 0):
    return SimpleNamespace(
        platform="tpu", device_kind=kind, coords=list(coords), core_on_chip=core, slice_index=slice_index
    )


def gpu(kind: str, number: int = 0):
    return SimpleNamespace(platform="gpu", device_kind=kind, id=number)


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5e", 197), ("TPU v5", 459), ("TPU v5p", 459),
     ("TPU v6 lite", 918), ("TPU v6e", 918), ("TPU7x", 2307)],
)  # fmt: skip
def test_tpus_are_known_by_the_names_that_jax_gives_them(kind, teraflops):
    assert peak_flops([tpu(kind, 0, 0, 0)]) == teraflops * 1e12


def test_gpus_are_known_by_the_names_that_their_driver_gives_them():
    for kind, teraflops in (("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H200", 989)):
        assert peak_flops([gpu(kind, n) for n in range(8)]) == 8 * teraflops * 1e12
    assert peak_flops([gpu("NVIDIA H100 PCIe")]) is None  # slower


def test_a_chip_counts_once_however_many_devices_it_shows():
    cores = [tpu("TPU7x", x, 0, 0, core=core) for x in range(4) for core in (0, 1)]
    assert peak_flops(cores) == 4 * CHIPS["tpu7x"].flops
    slices = [tpu("TPU v5 lite", 0, y, 0, slice_index=index) for index in range(2) for y in range(4)]
    assert peak_flops(slices) == 8 * CHIPS["v5e"].flops


def test_what_is_not_known_has_no_peak():
    assert peak_flops(jax.devices()) is None
    assert peak_flops([gpu("NVIDIA H200"), gpu("NVIDIA GeForce", 1)]) is None


def test_no_kind_is_two_chips():
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))


def test_memory_is_what_a_device_says_or_what_its_kind_has():
    def absent():
        raise RuntimeError("MemoryStats is only supported for addressable PjRt devices")

    device = lambda kind, stats: SimpleNamespace(device_kind=kind, memory_stats=stats)  # noqa: E731
    assert memory_of(device("NVIDIA A100-SXM4-80GB", lambda: {"bytes_limit": 30 * GIB})) == 30 * GIB
    assert memory_of(device("TPU v5 lite", absent)) == 15.75 * GIB
    assert memory_of(device("TPU7x", absent)) == 94.75 * GIB  # of one of the chip's two devices
    assert memory_of(device("cpu", lambda: None)) is None
