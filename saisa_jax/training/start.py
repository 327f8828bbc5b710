"""Where a stage's parameters come from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from etils import epath

from saisa_jax.batch import empty_batch
from saisa_jax.checkpoints import load_model
from saisa_jax.config import Config, ConfigError
from saisa_jax.models.saisa import Saisa, abstract_params, share_to_per_layer
from saisa_jax.training.optimizer import flatten

STAGES = ("pretrain", "finetune")


def model_directory(workdir: epath.Path, stage: str) -> epath.Path:
    """Where a stage leaves its finished model."""
    return workdir / stage / "model"


def starting_params(config: Config, stage: str, workdir: epath.Path) -> tuple[Callable[[], Any], str]:
    """A function that makes the stage's first parameters, and where they come from.

    In this order: the finished model of the stage before in the same workdir; `init_from`; random weights. (A run that
    has checkpoints of its own goes on from them; see `loop.py`.)

    Raises:
      ConfigError: weights whose shapes are not those of the configured model, all of them listed.
    """
    model = config.model_for(stage)
    previous = [model_directory(workdir, name) for name in STAGES[: STAGES.index(stage)]]
    source = next((str(path) for path in reversed(previous) if path.exists()), config.init_from)
    if not source:
        logging.info("%s starts from random weights (seed %d)", stage, config.seed)
        example = jax.tree.map(jax.numpy.asarray, empty_batch(1, 1, 1, model.vision.image_size))
        init = functools.partial(Saisa(model).init, jax.random.key(config.seed), example)
        return lambda: init()["params"], "random"

    params, _, _, _ = load_model(source)
    if model.per_layer_projectors and "visual_proj" in params:
        logging.info("every layer's projector starts from a copy of the shared one of %s", source)
        convert = functools.partial(share_to_per_layer, config=model)
    elif not model.per_layer_projectors and "visual_proj" not in params:
        raise ConfigError(
            f"{source} has a projector for each layer, and {stage}.sharing=shared wants one: "
            f"set --config.{stage}.sharing=per_layer"
        )
    else:
        convert = lambda params: params  # noqa: E731
    _check_shapes(jax.eval_shape(convert, params), abstract_params(model), source)
    return lambda: convert(params), source


def _check_shapes(seen: Any, expected: Any, source: str) -> None:
    have, want = flatten(seen), flatten(expected)
    problems = [f"{path} is missing" for path in want if path not in have]
    problems += [f"{path} is unexpected" for path in have if path not in want]
    problems += [
        f"{path} is {have[path].shape}, expected {want[path].shape}"
        for path in want
        if path in have and have[path].shape != want[path].shape
    ]
    if problems:
        raise ConfigError(f"{source} does not fit --config.model: " + "; ".join(problems))
