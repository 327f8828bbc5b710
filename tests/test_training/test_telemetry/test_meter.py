"""Rates of an interval: what they are made of, and what does not spoil them."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from saisa_jax.config import StageConfig
from saisa_jax.flops import StepFlops
from saisa_jax.training.telemetry.goodput import Goodput
from saisa_jax.training.telemetry.meter import Meter, peak_memory, slowest

HALF_LEGAL = {"attention_legal": 0.5, "attention_visited": 0.75}
SETTINGS = StageConfig(batch_size=8, text_length=100, max_images=2)


def device(kind: str, number: int = 0, **memory):
    return SimpleNamespace(
        platform="gpu", device_kind=kind, id=number, process_index=0, memory_stats=lambda: memory or None
    )


def step(clock, time, data: float, seconds: float) -> None:
    with clock("data"):
        time.now += data
    with clock("step"):
        time.now += seconds


def test_rates_leave_out_the_first_step_and_pauses(time):
    clock = Goodput()
    gpus = [device("NVIDIA H100 80GB HBM3", n, peak_bytes_in_use=5 + n) for n in range(2)]
    work = StepFlops(needed=989e12, needed_attention=989e12, executed=2 * 989e12, executed_attention=4 * 989e12)
    gauge = Meter(clock, SETTINGS, 100, work, gpus)
    time.now += 50  # reads parameters
    with clock("compile"):
        time.now += 60
    gauge.add(samples=8, text_fill=1.0, **HALF_LEGAL)
    assert gauge.read(1) == {"device_memory_bytes": 6.0}

    for _ in range(4):
        step(clock, time, data=0.1, seconds=0.9)
        gauge.add(samples=10, text_fill=0.75, **HALF_LEGAL)
    with clock("eval"):
        time.now += 30
    with clock("save"):
        time.now += 10
    read = gauge.read(5)
    assert read == pytest.approx(
        {
            "seconds_per_step": 1.0,
            "samples_per_second": 10.0,
            "tokens_per_second": 600.0,
            "mfu": 0.25,  # half of one GPU's peak, of two
            "hfu": 0.5,
            "data_wait": 0.1,
            "seconds_left": 95 * (1.0 + 40 / 4),
            "device_memory_bytes": 6.0,
        }
    )

    step(clock, time, data=0.0, seconds=2.0)
    gauge.add(samples=4, text_fill=1.0, **HALF_LEGAL)
    read = gauge.read(6)
    assert (read["samples_per_second"], read["tokens_per_second"], read["data_wait"]) == (2.0, 400.0, 0.0)
    assert read["seconds_left"] == pytest.approx(94 * (1.0 + 0.3 + 40 / 5))


def test_a_first_interval_is_not_spoilt_by_its_compilation(time):
    clock = Goodput()
    gauge = Meter(clock, SETTINGS, 10, StepFlops(1.5e12, 1e12, 2e12, 1e12), jax.devices())
    with clock("compile"):
        time.now += 600
    gauge.add(samples=8, text_fill=0.5, **HALF_LEGAL)
    for _ in range(4):
        step(clock, time, 0.0, 2.0)
        gauge.add(samples=8, text_fill=0.5, **HALF_LEGAL)
    read = gauge.read(5)
    assert (read["seconds_per_step"], read["samples_per_second"], read["seconds_left"]) == (2.0, 4.0, 10.0)
    assert read["tflops_per_second"] == 0.5 and "mfu" not in read  # the peak of a CPU is unknown
    assert 0 < read["process_memory_bytes"] < 2**45


def test_memory_is_that_of_devices_that_tell():
    assert peak_memory([device("x", peak_bytes_in_use=3), device("y")]) == {"device_memory_bytes": 3.0}
    assert set(peak_memory([device("x")])) == {"process_memory_bytes"}


@pytest.mark.parametrize(
    ("waits", "found"),
    [
        ([0.1, 0.1, 4.0, 0.2], {"slowest_process": 2, "slowest_data_wait": 0.4}),
        ([3.0, 3.0, 4.0, 3.0], {}),  # all of them wait
        ([0.0, 0.0, 0.4, 0.0], {}),  # it does not matter
        ([4.0], {}),
        ([], {}),
    ],
)
def test_the_process_that_holds_up_the_others_is_named(waits: list[float], found: dict[str, float]) -> None:
    assert slowest(np.asarray(waits), 10.0) == found
