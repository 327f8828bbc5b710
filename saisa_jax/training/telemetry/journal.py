"""What a stage says of its steps, and what becomes of those that went wrong."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging
from etils import epath

from saisa_jax.config import Config, to_dict
from saisa_jax.data.rows.reader import Rows
from saisa_jax.data.sample import DataError
from saisa_jax.errors import UserError
from saisa_jax.training import processes
from saisa_jax.training.telemetry.goodput import Goodput
from saisa_jax.training.telemetry.meter import Meter
from saisa_jax.training.telemetry.metrics import MetricsWriter, Progress
from saisa_jax.training.telemetry.skipped import SkippedSteps
from saisa_jax.training.telemetry.wandb import WandbLog


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; the message names the step and its samples."""


class Journal:
    """Rows of metrics, progress, and what was dropped or skipped.

    Each process writes rows, the first one into the stage's directory, the others beside them into process_1, ...; what
    is there once (progress, TensorBoard, W&B) is the first one's.

    Args:
      config: the run's.
      name: of the stage.
      directory: of the stage.
      rows: of the stage.
      steps: of the stage.
      clock: of the stage.

    Attributes:
      remembered: what a checkpoint keeps of it: samples dropped and text tokens cut off since the first step, and the
        last loss.
    """

    def __init__(self, config: Config, name: str, directory: epath.Path, rows: Rows, steps: int, clock: Goodput):
        self._config, self._name, self._directory, self._rows = config, name, directory, rows
        self._steps, self._clock = steps, clock
        self.remembered: dict[str, Any] = {"dropped": 0, "cut_tokens": 0, "last_loss": None}

    @contextlib.contextmanager
    def open(self, first: int, flops: float, crew: processes.Crew, devices: list[Any]) -> Iterator[None]:
        """While it is entered, steps can be logged.

        Args:
          first: the last step that was done before.
          flops: that a step needs.
          crew: of the run.
          devices: that it runs on, of all processes.
        """
        habits, alone = self._config.training, processes.is_first()
        wandb = habits.wandb if alone else None
        self._first, self._crew, self._skipped = first, crew, SkippedSteps(self._directory, first)
        self._meter = Meter(self._clock, self._config.stage(self._name), self._steps, flops, devices)
        with (
            MetricsWriter(
                processes.own(self._directory),
                habits.tensorboard and alone,
                resume_step=first,
                wandb=WandbLog(wandb, self._directory, to_dict(self._config)) if wandb else None,
            ) as self._writer,
            Progress(self._name, self._steps, first, shown=alone) as self._progress,
        ):
            self._clock.lose(self._writer.cut, first)
            yield

    def log(self, step: int, metrics: Mapping[str, Any], dropped: tuple[str, ...], told: Any) -> None:
        """Reads a step's results, when the next one has been started.

        Args:
          step: the step that they are of.
          metrics: of `make_train_step`.
          dropped: samples of this process's rows that could not be used, and why.
          told: of `Crew.tell`.

        Raises:
          TrainingError: the loss or the gradient is not finite, and that is to stop the run.
          DataError: no sample of the step could be used.
          Exception: a process has failed (`Crew.hear`).
        """
        with self._clock("step"):
            news = self._crew.hear(told)
            values = {name: float(value) for name, value in metrics.items()}
        self._meter.add(values["samples"], values["text_fill"])
        self.remembered["dropped"] += news.dropped
        self.remembered["cut_tokens"] += news.cut_tokens
        if dropped:
            self._writer.write("dropped", step, samples=dropped)
        if not values["tokens"]:
            raise DataError(f"no sample of the batch of step {step} can be used: {'; '.join(dropped[:5])}")
        if values.pop("skipped"):
            self._not_finite(step, values)
            return
        if step % self._config.training.log_every and step != self._steps:
            return
        losses_of_data = {name: self.remembered[name] for name in ("dropped", "cut_tokens")}
        values |= losses_of_data | self._meter.read(step)
        self._progress.update(step, **values)
        self._writer.write("train", step, **values, seconds=self._clock.seconds)
        self.remembered["last_loss"] = values["loss"]

    def evaluated(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes a held-out evaluation, unless an earlier start from the same step has made up for it."""
        if step > self._first or not self._writer.holds("eval", step):
            self._writer.write("eval", step, **values)
            logging.info("%s, step %d: held-out loss %.4g", self._name, step, values["loss"])

    def close(self, step: int) -> None:
        """The last row of a start: where its time went."""
        self._writer.write("goodput", step, **self._clock.account())
        logging.info("%s, up to step %d: %s", self._name, step, self._clock)

    def _not_finite(self, step: int, values: Mapping[str, float]) -> None:
        """What becomes of a step that changed nothing, since its loss or gradient was not finite."""
        habits = self._config.training
        names = self._rows.names((step - 1) * self._rows.batch_size)
        broken = ", ".join(f"{name} is {value}" for name, value in values.items() if not math.isfinite(value))
        what = f"{broken} at step {step} of {self._name}; its batch held {', '.join(names)}"
        advice = f"The last good checkpoint is kept; try a lower --config.{self._name}.optimizer.lr"
        self._writer.write("train" if habits.on_nan == "stop" else "skipped", step, **values)
        if habits.on_nan == "stop":
            raise TrainingError(f"{what}. {advice}, or --config.training.on_nan=skip")
        in_a_row = self._skipped.add(step, values, names)
        logging.warning("%s; it was skipped", what)
        if in_a_row > habits.max_skips:
            raise TrainingError(
                f"{what}. {in_a_row} steps in a row were not finite, more than --config.training.max_skips="
                f"{habits.max_skips}. {advice}"
            )

    def summarize(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Writes summary.json: the values, how long the stage took, and the last loss."""
        summary = {
            **values,
            "wall_seconds": self._clock.seconds,
            "goodput": self._clock.account(),
            "final_loss": self.remembered["last_loss"],
        }
        if processes.is_first():
            (self._directory / "summary.json").write_text(json.dumps(summary, indent=2))
        return summary
