"""Being stopped, and not running twice: signals as a flag, and a lock on the run's directory."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

from absl import logging

from saisa_jax import buckets
from saisa_jax.training.lease import Lease, RunLockedError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the last: a terminal or a connection that is gone


class StopSignal:
    """While it is entered, a signal is a wish to stop after the current step; a second Ctrl-C stops at once.

    A signal that is ignored when it is entered stays ignored, as for a job that a shell runs in the background. Python
    delivers signals to the main thread alone; in another one nothing is caught.

    Args:
      guard: called whenever somebody asks whether to stop; raises if the run must not even write a checkpoint.
    """

    def __init__(self, guard: Callable[[], None] | None = None) -> None:
        self._guard = guard
        self._requested: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is not threading.main_thread():
            logging.warning("signals do not reach this thread: the run cannot be stopped by SIGTERM or Ctrl-C")
            return self
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: installed outside Python

    @property
    def requested(self) -> str | None:
        """Name of the first signal that came ("SIGTERM"), or None."""
        if self._guard is not None:
            self._guard()
        return self._requested

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._requested is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self._requested = name
        # Straight to the file descriptor: the signal may have come in the middle of a print.
        hint = "; Ctrl-C once more stops at once" if number == signal.SIGINT else ""
        with contextlib.suppress(OSError):
            os.write(2, f"\n{name}: stopping after this step, with a checkpoint{hint}\n".encode())


@contextlib.contextmanager
def run_lock(directory: str | os.PathLike[str]) -> Iterator[Callable[[], None] | None]:
    """Keeps other runs out of a directory; in a run of several processes the first one takes it.

    On a disk it is a lock of the operating system, which lets go of it when the process ends, however it ends. A bucket
    has no locks, nor do some network drives: there it is a lease (`lease.py`), for which a start after a kill waits.

    Args:
      directory: made if it is not there.

    Returns:
      what to ask before anything is written (a `StopSignal` does); raises when another run has taken the directory
      over. None: that cannot be.

    Raises:
      RunLockedError: another process holds it; names it.
    """
    path = buckets.place(directory)
    path.mkdir(parents=True, exist_ok=True)
    if buckets.is_remote(path):
        with Lease(path) as lease:
            yield lease.check
        return
    import fcntl  # not on Windows

    file = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    with contextlib.ExitStack() as closing:
        closing.callback(os.close, file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 1000, 0).decode(errors="replace").strip() or "another process"
            raise RunLockedError(
                f"{path} is in use by {holder}; wait until it has ended, stop it, or choose another --workdir"
            ) from None
        except OSError as error:
            logging.warning("%s cannot be locked (%s): a lease in it will do", path, error)
            yield closing.enter_context(Lease(path)).check
            return
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield None
