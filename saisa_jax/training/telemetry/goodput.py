"""Where the wall time of a stage goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from saisa_jax.training.telemetry.metrics import duration

KINDS: tuple[str, ...] = ("start", "compile", "data", "step", "save", "eval", "lost", "other")


class Goodput:
    """Seconds of a stage by what they were spent on, from when it is made.

    start    parameters, data and a checkpoint are read, before the first step
    compile  the first call of the train step
    data     the host waits for a batch; the devices may still be busy with the step before
    step     a step is started, and the results of the one before it waited for
    save     a checkpoint is copied off the devices, or waited for
    eval     held-out evaluation, its own compilation too
    lost     steps that an interruption has undone, by their rows in metrics.jsonl
    other    the rest

    A stage that resumes from a checkpoint also counts what the checkpoint says of earlier starts. The time between two
    starts is not counted.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._spent = dict.fromkeys(KINDS, 0.0)
        self._earlier = dict.fromkeys(KINDS, 0.0)
        self._lost_steps = 0

    @contextlib.contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        """What is done inside is of that kind; not to be nested."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._spent[kind] += time.monotonic() - began

    def __getitem__(self, kind: str) -> float:
        """Seconds of a kind since this start; of "other", use `account`."""
        return self._spent[kind]

    def started(self) -> None:
        """Whatever was done up to now was `start`."""
        self._spent["start"] = time.monotonic() - self._began

    def go_on(self, account: Mapping[str, float]) -> None:
        """Counts what a checkpoint says of earlier starts: its `account`."""
        self._earlier = {kind: float(account[f"{kind}_seconds"]) for kind in KINDS}
        self._lost_steps = int(account["lost_steps"])

    def lose(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Counts what an interruption has undone: the rows of metrics.jsonl after `step`, where the stage resumes."""
        timed = [row for row in rows if "seconds" in row]
        if timed:
            self._lost_steps += timed[-1]["step"] - step
            self._earlier["lost"] += timed[-1]["seconds"] - sum(self._earlier.values())

    @property
    def seconds(self) -> float:
        """Of all kinds together."""
        return time.monotonic() - self._began + sum(self._earlier.values())

    def account(self) -> dict[str, float]:
        """{"start_seconds": ..., "lost_steps": steps that were made twice}; JSON-ready."""
        now = {**self._spent, "other": time.monotonic() - self._began - sum(self._spent.values())}
        seconds = {f"{kind}_seconds": now[kind] + self._earlier[kind] for kind in KINDS}
        return {**seconds, "lost_steps": self._lost_steps}

    def __str__(self) -> str:
        account, total = self.account(), max(self.seconds, 1e-9)
        shares = {kind: account[f"{kind}_seconds"] / total for kind in KINDS}
        again = f"; {self._lost_steps} step(s) were made twice" if self._lost_steps else ""
        parts = ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items() if share >= 0.0005)
        return f"{duration(total)}: {parts}{again}"
