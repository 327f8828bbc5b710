"""Throughput, utilisation and memory of a run."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from saisa_jax.chips import peak_flops
from saisa_jax.config import StageConfig
from saisa_jax.flops import StepFlops
from saisa_jax.training.telemetry.goodput import Goodput

PAUSES = ("save", "eval")  # the clock's; training waits meanwhile
STRAGGLES = 0.05  # of the time, more than twice what the median process waits


class Meter:
    """Rates of the steps between two readings. The first step, which holds the compilation, is left out.

    Rates are by the seconds of training: saves and evaluations do not count. MFU is by the FLOPs that forward and
    backward passes need, with the legal pairs of attention alone and padding included; HFU by those that the program
    executes, recomputed ones and masked pairs that attention does not skip among them.

    Args:
      clock: of the stage.
      settings: of the stage; say how much room a step has.
      steps: of the stage.
      work: FLOPs of a step.
      devices: that it runs on, of all processes.
    """

    def __init__(self, clock: Goodput, settings: StageConfig, steps: int, work: StepFlops, devices: Sequence[Any]):
        self._clock, self._work, self._steps_in_all = clock, work, steps
        self._text_room = settings.batch_size * settings.text_length
        self._peak = peak_flops(devices)
        self._devices = [device for device in devices if device.process_index == jax.process_index()]
        self._begun = False
        self._all_steps, self._seconds_per_step = 0, 0.0
        self._restart()

    def add(
        self,
        samples: float,
        text_fill: float,
        attention_legal: float,
        attention_visited: float,
        waits: Sequence[float] = (),
    ) -> None:
        """Counts a step when its results are there, with what its batch held (metrics of `make_train_step`).

        Args: those metrics; and `waits`, the seconds that each process has waited for its rows.
        """
        if not self._begun:
            self._begun = True
            self._restart()
            return
        self._steps += 1
        self._samples += samples
        self._text_tokens += text_fill * self._text_room
        self._waits = np.add(self._waits, waits)
        self._useful += self._work.useful(attention_legal)
        self._done += self._work.done(attention_visited)

    def read(self, step: int) -> dict[str, float]:
        """Rates of the steps since the last reading, up to `step`.

        Returns:
          seconds_per_step; samples_per_second; tokens_per_second (of text, without padding); mfu and hfu (0..1), or
          tflops_per_second (of those that mfu counts) of all devices if their peak is unknown; data_wait (0..1);
          slowest_process and its slowest_data_wait, where one waits for its rows much longer than most; seconds_left
          of the stage, saves and evaluations included. Nothing of these if no step was added. And
          device_memory_bytes, the most that a device of this process has held so far, or process_memory_bytes.
        """
        return {**self._rates(step), **peak_memory(self._devices)}

    def _rates(self, step: int) -> dict[str, float]:
        steps, seconds = self._steps, self._training_seconds() - self._since
        data = self._clock["data"] - self._data_before
        samples, text_tokens, waits = self._samples, self._text_tokens, self._waits
        useful, done = self._useful, self._done
        self._restart()
        if not steps:
            return {}
        seconds = max(seconds, 1e-9)
        first = not self._all_steps
        self._all_steps += steps
        self._seconds_per_step += (1.0 if first else 0.3) * (seconds / steps - self._seconds_per_step)
        pauses = sum(self._clock[kind] for kind in PAUSES) / self._all_steps
        peak = self._peak
        speed = {"mfu": useful / seconds / peak, "hfu": done / seconds / peak} if peak else {}
        return {
            "seconds_per_step": seconds / steps,
            "samples_per_second": samples / seconds,
            "tokens_per_second": text_tokens / seconds,
            **(speed or {"tflops_per_second": useful / seconds / 1e12}),
            "data_wait": data / seconds,
            **slowest(waits, seconds),
            "seconds_left": (self._steps_in_all - step) * (self._seconds_per_step + pauses),
        }

    def _restart(self) -> None:
        self._steps, self._samples, self._text_tokens, self._useful, self._done = 0, 0.0, 0.0, 0.0, 0.0
        self._waits = np.zeros(())
        self._since, self._data_before = self._training_seconds(), self._clock["data"]

    def _training_seconds(self) -> float:
        return time.monotonic() - sum(self._clock[kind] for kind in PAUSES)


def slowest(waits: np.ndarray, seconds: float) -> dict[str, float]:
    """Which process holds up the others, if one waits for its rows longer than most; they wait for it in the step.

    Args:
      waits: seconds of each process.
      seconds: of the training in which they have waited.
    """
    if waits.size < 2 or waits.max() < 2 * np.median(waits) + STRAGGLES * seconds:
        return {}
    process = int(waits.argmax())
    return {"slowest_process": process, "slowest_data_wait": float(waits[process]) / seconds}


def peak_memory(devices: Sequence[Any]) -> dict[str, float]:
    """{"device_memory_bytes"} of the fullest device, or {"process_memory_bytes"} of devices that do not report it."""
    stats = [device.memory_stats() or {} for device in devices]
    peak = max((held.get("peak_bytes_in_use", 0) for held in stats), default=0)
    if peak:
        return {"device_memory_bytes": float(peak)}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"process_memory_bytes": float(resident * (1 if sys.platform == "darwin" else 1024))}
