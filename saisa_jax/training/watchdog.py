"""Ends a run that hangs: a heartbeat goes on while Python waits for ever, and with it every other host."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType
from typing import Any

import jax

STATUS = 1  # of a process that the watchdog ends


class Watchdog:
    """Watches that something happens: use it as a context manager, and call `beat` when it does.

    After `seconds` without a beat the stacks of all threads are written, and after as long again the process ends with
    status 1, so that a scheduler starts it anew; a run of several processes ends with it (`exit_on_lost_process`). It
    begins with the first beat: how long compilation takes nobody knows.

    Args:
      seconds: 0: it does nothing.
      stream: where to write; None: stderr.
    """

    def __init__(self, seconds: float, stream: Any = None):
        self._seconds, self._stream = seconds, stream
        self._last: tuple[float, str] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self, what: str) -> None:
        """Something has happened; `what` is named if nothing follows."""
        self._last = time.monotonic(), what

    def _watch(self) -> None:
        told: tuple[float, str] | None = None  # the beat of which the stacks were written
        while not self._ended.wait(min(1.0, self._seconds / 4)):
            if self._last is None:
                continue
            silent, what = time.monotonic() - self._last[0], self._last[1]
            if silent > 2 * self._seconds:
                self._say(f"nothing has followed {what} for {silent:.0f} s: this process ends, with status {STATUS}")
                os._exit(STATUS)
            if silent > self._seconds and told != self._last:
                told = self._last
                self._say(
                    f"nothing has followed {what} for {silent:.0f} s (--config.training.watchdog={self._seconds:g}); "
                    f"in {2 * self._seconds - silent:.0f} s this process ends. What its threads do:"
                )
                faulthandler.dump_traceback(self._stream or sys.stderr, all_threads=True)

    def _say(self, text: str) -> None:
        print(f"watchdog of process {jax.process_index()}: {text}", file=self._stream or sys.stderr, flush=True)
