"""Benchmarks while training: what `eval.py` does, with the parameters as they are at a step."""

from __future__ import annotations

import dataclasses
from itertools import islice
from typing import Any

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh

from saisa_jax.config import Config, ConfigError
from saisa_jax.data.sample import DataError
from saisa_jax.errors import UserError
from saisa_jax.evaluation import runner
from saisa_jax.evaluation.tasks import TASKS, TaskData
from saisa_jax.inference.image_cache import ImageCache
from saisa_jax.inference.model import VisionLanguageModel

CACHE_BYTES = 2**26  # of keys and values of images: the memory is training's


class HeldOutTasks:
    """Evaluates a stage's parameters on `training.eval_tasks`, and writes the answers into DIRECTORY/tasks/STEP.

    Nothing of it touches the state or the data's position. A task that fails while training is told of and left out:
    the run goes on. Every process calls it; where there are several, an error of the system (a full disk) ends the run,
    since the others may be in the middle of an answer.

    Args:
      config: the run's.
      stage: its name.
      tokenizer: of the run.
      mesh: that holds the parameters; None: one device does.
      directory: of the stage.
    """

    def __init__(self, config: Config, stage: str, tokenizer: Any, mesh: Mesh | None, directory: epath.Path):
        self._names, self._directory = config.training.eval_tasks, directory
        # Without parameters: each evaluation brings its own, and keeps the compiled programs.
        self._model = VisionLanguageModel(None, config, tokenizer, stage, {"stage": stage}, mesh, ImageCache(0))
        settings = config.evaluation
        self._settings = runner.Settings(
            settings.batch_size,
            settings.max_new_tokens,
            config.training.eval_limit,
            image_cache_bytes=CACHE_BYTES,
        )

    def __call__(self, params: Any, step: int) -> dict[str, float]:
        """{"easy_vqa": 0.31, "pope/f1": 0.4}: of each task the mean score and further metrics; in the first process.

        Args:
          params: of the plain model, without adapters.
          step: that they are of.
        """
        model = dataclasses.replace(self._model, params=params, image_cache=ImageCache(0))
        vars(model)["generator"] = self._model.generator
        output, values = self._directory / "tasks" / str(step), {}
        for name in self._names:
            try:
                record = runner.evaluate(model, name, self._settings, output, f"{self._directory} at step {step}")
            except (UserError, OSError) as error:
                if jax.process_count() > 1 and not isinstance(error, UserError):
                    raise
                logging.error("step %d: %s is not evaluated: %s", step, name, error)
                continue
            if record is None:  # in other processes than the first
                continue
            if record["accuracy"] is not None:
                values[name] = record["accuracy"]
            values |= {f"{name}/{metric}": value for metric, value in record["metrics"].items()}
        return values


def check_tasks(config: Config) -> None:
    """Finds what would stop `training.eval_tasks` before anything is trained.

    Raises:
      UnknownNameError, ConfigError, DataError: no such task, or one that has nothing to ask.
    """
    for name in config.training.eval_tasks:
        for stage in filter(lambda stage: evaluates_tasks(config, stage), config.stages):
            asked = TaskData(validation=config.stage(stage).validation, stage=stage, task=name)
            first = list(islice(TASKS[name].items(asked), 1))
            if not first or isinstance(first[0], DataError):
                raise ConfigError(
                    f"training.eval_tasks: {name} has nothing to ask in {stage}{f': {first[0]}' if first else ''}"
                )


def evaluates_tasks(config: Config, stage: str) -> bool:
    """Whether a stage answers questions at all: with the template `plain` it reads pictures alone."""
    return bool(config.training.eval_tasks) and config.stage(stage).template != "plain"
