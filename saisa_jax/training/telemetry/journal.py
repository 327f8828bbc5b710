"""What is recorded of a stage's steps; what becomes of them is the loop's to decide."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from saisa_jax import buckets
from saisa_jax.config import Config, to_dict
from saisa_jax.flops import StepFlops
from saisa_jax.training import processes
from saisa_jax.training.telemetry.goodput import Goodput
from saisa_jax.training.telemetry.meter import Meter
from saisa_jax.training.telemetry.metrics import MetricsWriter, Progress
from saisa_jax.training.telemetry.skipped import SkippedSteps
from saisa_jax.training.telemetry.wandb import WandbLog

DROPS_SHOWN = 10  # samples that could not be used, in words; metrics.jsonl has all


class Journal:
    """Rows of metrics, progress, and what was dropped or skipped.

    Each process writes rows, the first one into the stage's directory, the others beside them into process_1, ...; what
    is there once (progress, TensorBoard, W&B) is the first one's.

    Args:
      config: the run's.
      name: of the stage.
      directory: of the stage.
      steps: of the stage.
      clock: of the stage.

    Attributes:
      remembered: what a checkpoint keeps of it: samples dropped, those of them that `data.max_drop` limits, and text
        tokens cut off since the first step; and the last loss.
    """

    def __init__(self, config: Config, name: str, directory: epath.Path, steps: int, clock: Goodput):
        self._config, self._name, self._directory = config, name, directory
        self._steps, self._clock = steps, clock
        self._drops_shown = 0
        self.remembered: dict[str, Any] = {"dropped": 0, "unusable": 0, "cut_tokens": 0, "last_loss": None}

    @contextlib.contextmanager
    def open(self, first: int, work: StepFlops, devices: list[Any]) -> Iterator[None]:
        """While it is entered, steps can be recorded.

        Args:
          first: the last step that was done before.
          work: FLOPs of a step.
          devices: that it runs on, of all processes.
        """
        settings, alone = self._config.training, processes.is_first()
        wandb = settings.wandb if alone else None
        self._first, self._skipped = first, SkippedSteps(self._directory, first)
        self._meter = Meter(self._clock, self._config.stage(self._name), self._steps, work, devices)
        with (
            MetricsWriter(
                processes.own(self._directory),
                settings.tensorboard and alone,
                resume_step=first,
                wandb=WandbLog(wandb, self._directory, to_dict(self._config)) if wandb else None,
            ) as self._writer,
            Progress(self._name, self._steps, first, shown=alone) as self._progress,
        ):
            self._clock.lose(self._writer.cut, first)
            yield

    def count(self, step: int, values: Mapping[str, float], lost: processes.Lost, dropped: tuple[str, ...]) -> None:
        """Counts what a step read.

        Args:
          step: that the rest is of.
          values: the metrics of `make_train_step`.
          lost: by all processes together.
          dropped: samples of this process's rows that could not be used, and why.
        """
        held = ("samples", "text_fill", "attention_legal", "attention_visited")
        self._meter.add(**{name: values[name] for name in held}, waits=lost.waits)
        self.remembered["dropped"] += lost.dropped
        self.remembered["unusable"] += lost.unusable
        self.remembered["cut_tokens"] += lost.cut_tokens
        if dropped:
            self._writer.write("dropped", step, samples=dropped)
            for reason in dropped[: max(0, DROPS_SHOWN - self._drops_shown)]:
                logging.warning("%s, step %d: left out: %s", self._name, step, reason)
            self._drops_shown += len(dropped)

    def trained(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a step's row and shows it, when one is due."""
        if step % self._config.training.log_every and step != self._steps:
            return
        losses_of_data = {name: self.remembered[name] for name in ("dropped", "cut_tokens")}
        values = {**values, **losses_of_data, **self._meter.read(step)}
        self._progress.update(step, **values)
        self._writer.write("train", step, **values, seconds=self._clock.seconds)
        self.remembered["last_loss"] = values["loss"]

    def failed(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the row of a step that stops the run, since its loss or gradient was not finite."""
        self._writer.write("train", step, **values)

    def skipped(self, step: int, values: Mapping[str, float], names: Sequence[str]) -> int:
        """Writes down a step that was skipped since its loss or gradient was not finite.

        Args:
          names: of the samples in its batch.

        Returns:
          how many steps have been skipped in a row, up to this one.
        """
        self._writer.write("skipped", step, **values)
        return self._skipped.add(step, values, names)

    def evaluated(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes a held-out evaluation, unless an earlier start from the same step has written it."""
        if step > self._first or not self._writer.holds("eval", step):
            self._writer.write("eval", step, **values)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, float))
            logging.info("%s, step %d, held out: %s", self._name, step, shown)

    def upload(self) -> None:
        """Has the rows where they are kept: to be called before a checkpoint, from which no row is written again."""
        self._writer.upload()

    def close(self, step: int) -> None:
        """The last row of a start: where its time went."""
        self._writer.write("goodput", step, **self._clock.account())
        logging.info("%s, up to step %d: %s", self._name, step, self._clock)

    def summarize(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Writes summary.json: the values, how long the stage took, and the last loss."""
        summary = {
            **values,
            "wall_seconds": self._clock.seconds,
            "goodput": self._clock.account(),
            "final_loss": self.remembered["last_loss"],
        }
        if processes.is_first():
            buckets.write_text(self._directory / "summary.json", json.dumps(summary, indent=2))
        return summary
