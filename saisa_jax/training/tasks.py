"""Benchmarks while training: what `eval.py` does, with the parameters as they are at a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh

from saisa_jax import parallel
from saisa_jax.config import Config, ConfigError
from saisa_jax.errors import UserError
from saisa_jax.evaluation import runner
from saisa_jax.evaluation.settings import Settings
from saisa_jax.evaluation.tasks import TASKS
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
        self._config, self._directory = config, directory
        # Without parameters: each evaluation brings its own, and keeps the compiled programs.
        self._model = VisionLanguageModel(None, config, tokenizer, stage, {"stage": stage}, mesh, ImageCache(0))

    def __call__(self, params: Any, step: int, stop: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """{"easy_vqa": 0.31, "pope/f1": 0.4}: of each task the mean score and further metrics; in the first process.

        Args:
          params: of the plain model, without adapters.
          step: that they are of.
          stop: whether this process was asked to stop.

        Raises:
          runner.Interrupted: `stop` of any process, or Ctrl-C; in all of them. With the same parameters and step it
            goes on.
        """
        model = dataclasses.replace(self._model, params=params, image_cache=ImageCache(0))
        vars(model)["generator"] = self._model.generator
        output, values = self._directory / "tasks" / str(step), {}
        for name in self._config.training.eval_tasks:
            try:
                settings, origin = settings_of(self._config, name), f"{self._directory} at step {step}"
                record = runner.evaluate(model, name, settings, output, origin, stop)
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
      UnknownNameError, ConfigError: no such task, or one whose questions or pictures are not there; in all processes.
    """

    def check() -> None:
        for name in config.training.eval_tasks:
            settings, task = settings_of(config, name), TASKS[name].under(config.training.eval_prompts)
            for stage in filter(lambda stage: evaluates_tasks(config, stage), config.stages):
                try:
                    runner.read_items(task, settings.place(name, config, stage), settings.limit)
                except UserError as error:
                    raise ConfigError(
                        f"training.eval_tasks={name} cannot be asked in {stage}: {error}. While training, --data is "
                        "--config.training.eval_data, and --images is --config.training.eval_images"
                    ) from error

    parallel.together(check)


def settings_of(config: Config, name: str) -> Settings:
    """How a task is run while training."""
    options = config.training
    where = {"data": options.eval_data, "images": options.eval_images, "prompts": options.eval_prompts}
    settings = Settings.of(name, config.evaluation, image_cache_bytes=CACHE_BYTES, **where)
    return dataclasses.replace(settings, limit=options.eval_limit)


def evaluates_tasks(config: Config, stage: str) -> bool:
    """Whether a stage answers questions at all: with the template `plain` it reads pictures alone."""
    return bool(config.training.eval_tasks) and config.stage(stage).template != "plain"
