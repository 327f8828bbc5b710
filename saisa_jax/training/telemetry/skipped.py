"""Steps that were skipped because their loss or gradient was not finite, with the samples that may be to blame."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

from saisa_jax import buckets
from saisa_jax.training import processes
from saisa_jax.training.telemetry.metrics import cut_back, jsonable


class SkippedSteps:
    """Rows in `directory/skipped.jsonl`: {"step", "samples", what the step measured}. The first process writes it.

    Args:
      directory: of the stage; it may not exist yet.
      resume_step: the last step that counts; what was skipped later, before an interruption, is forgotten.
    """

    def __init__(self, directory: str | os.PathLike[str], resume_step: int):
        self.path = buckets.place(directory) / "skipped.jsonl"
        self._writes = processes.is_first()
        if self._writes:
            cut_back(self.path, resume_step)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self._steps = {row["step"] for row in map(json.loads, lines) if row["step"] <= resume_step}

    def add(self, step: int, values: Mapping[str, float], samples: Sequence[str]) -> int:
        """Writes a skipped step down; returns how many have been skipped in a row, up to this one."""
        self._steps.add(step)
        if self._writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            row = jsonable({"step": step, **values, "samples": samples})
            buckets.append_text(self.path, json.dumps(row, allow_nan=False) + "\n")
        before = step
        while before in self._steps:
            before -= 1
        return step - before
