"""`python -m saisa_jax bench eval`: questions a second of an evaluation, and where its time goes.

The questions of a task are answered three times, after a first pass that compiles: as `eval.py` does it; then with a
wait after each program, which tells what encoding, and prefill with decoding, take; and so once more with one new token
an answer, which is the prefill alone. `host` is what the devices wait for: pictures that are read and rows that are
packed. In the first of the three these overlap, so that it takes less time than the parts together.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from rich.table import Table

from saisa_jax.inference.batches import Answerer, Prompt
from saisa_jax.inference.model import VisionLanguageModel

PARTS = ("host", "encode", "prefill", "decode")


class Timed(NamedTuple):
    """What an evaluation took.

    Attributes:
      seconds: of all questions, as `eval.py` answers them.
      waited: seconds of it in which the host waited for the devices; in the others they may have waited for it.
      parts: seconds of each of PARTS, one after the other.
      tokens: that were generated.
    """

    questions: int
    seconds: float
    waited: float
    parts: dict[str, float]
    tokens: int


class Clock:
    """Seconds between the events of an `Answerer`, by what was done; `wait`: until its result is there."""

    def __init__(self, wait: bool) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._wait, self._last = wait, time.perf_counter()

    def __call__(self, what: str, result: Any) -> None:
        if self._wait:
            jax.block_until_ready(result)
        now = time.perf_counter()
        self.seconds[what] += now - self._last
        self._last = now


def bench(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    batches: Sequence[Sequence[int | None]],
    max_new_tokens: int,
    cache_bytes: int,
) -> Timed:
    """Answers the prompts of a plan again and again; the arguments are those of an `Answerer`."""

    def answer(tokens: int, wait: bool) -> tuple[float, dict[str, float], int]:
        clock, started, said = Clock(wait), time.perf_counter(), 0
        for answers in Answerer(model, prompts, batches, tokens, cache_bytes, watch=clock):
            said += sum(len(row) for row in answers if isinstance(row, list))
        return time.perf_counter() - started, clock.seconds, said

    for tokens in (max_new_tokens, 1):
        answer(tokens, wait=False)  # compiles
    seconds, overlapped, said = answer(max_new_tokens, wait=False)
    _, apart, _ = answer(max_new_tokens, wait=True)
    _, first, _ = answer(1, wait=True)
    prefill = min(first["answer"], apart["answer"])
    parts = {"host": apart["host"], "encode": apart["encode"], "prefill": prefill, "decode": apart["answer"] - prefill}
    return Timed(len(prompts), seconds, overlapped["receive"], parts, said)


def table(timed: Timed) -> Table:
    """The parts, and their shares."""
    total = sum(timed.parts.values())
    shown = Table("", "s", "ms a question", "share", title_justify="left")
    for column in shown.columns[1:]:
        column.justify = "right"
    for part in PARTS:
        seconds = timed.parts[part]
        shown.add_row(part, f"{seconds:.2f}", f"{1e3 * seconds / timed.questions:.2f}", f"{seconds / total:.0%}")
    shown.add_section()
    shown.add_row("one after the other", f"{total:.2f}", f"{1e3 * total / timed.questions:.2f}", "")
    shown.add_row("as eval.py does it", f"{timed.seconds:.2f}", f"{1e3 * timed.seconds / timed.questions:.2f}", "")
    return shown
