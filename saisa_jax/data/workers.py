"""Worker processes for work on samples: started afresh, and gone with the process that started them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any


@contextlib.contextmanager
def worker_pool(workers: int, start: Callable[..., None], *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """Processes that first call `start(stop, *arguments)`.

    When the block is left, the event `stop` is set, what has not begun is cancelled, and the rest is waited for.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of this process's threads
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, context, _start, (start, stop, *arguments))
    try:
        yield pool
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(start: Callable[..., None], *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the main process too, which then says `stop`
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    start(*arguments)


def _leave_with_parent() -> None:
    """Ends this process when the main one is gone: a killed one cannot send `stop`."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
