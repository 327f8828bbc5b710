"""A profiler trace of a few steps, on request."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import jax
from absl import logging
from etils import epath

from saisa_jax import buckets
from saisa_jax.config import ProfileConfig


class Profiler:
    """Traces the steps that `profile.steps` names into a directory: `steps=10,15` from the 10th up to the 15th.

    Use it as a context manager around the loop, and call it for every step that was started.

    Args:
      config: without steps it does nothing.
      directory: for the trace.
      first: the last step that was done before; of a range that is partly done, the rest is traced.
    """

    def __init__(self, config: ProfileConfig, directory: epath.Path, first: int = 0):
        self._steps, self._directory, self._first, self._reached = config.steps, directory, first, first
        self._running, self._traced = False, False

    def __enter__(self) -> Profiler:
        self._start_before(self._reached + 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running:
            self._stop()
        elif self._steps and not self._traced:
            made = f"this start made the steps after {self._first} up to {self._reached}"
            logging.warning("no trace of profile.steps=%d,%d: %s", *self._steps, made)

    def started(self, step: int, results: Any) -> None:
        """To be called when a step was started; waits for its results if the trace ends with it."""
        self._reached = step
        if self._running and step >= self._steps[1]:
            jax.block_until_ready(results)
            self._stop()
        self._start_before(step + 1)

    def _start_before(self, step: int) -> None:
        if self._running or self._traced or not self._steps or not self._steps[0] <= step <= self._steps[1]:
            return
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # calls of Python functions fill the trace, and say nothing about the devices
        self._mirror = buckets.Mirror(self._directory)  # the profiler writes to disks
        jax.profiler.start_trace(self._mirror.local, profiler_options=options)
        self._running = True

    def _stop(self) -> None:
        self._running, self._traced = False, True
        jax.profiler.stop_trace()
        self._mirror.close()
        logging.info(
            "trace up to step %d: look at it with `pip install xprof; xprof --logdir=%s`, or open the "
            "*.trace.json.gz under it in https://ui.perfetto.dev",
            self._reached,
            self._directory,
        )
