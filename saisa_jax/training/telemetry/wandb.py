"""Weights & Biases, optionally: the numbers of metrics.jsonl."""

from __future__ import annotations

import importlib
import importlib.util
import secrets
from collections.abc import Mapping
from typing import Any

from etils import epath

from saisa_jax.config import ConfigError


def check_wandb(project: str | None) -> None:
    """Raises ConfigError if W&B is asked for and not there."""
    if project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"--config.training.wandb={project} needs wandb: pip install wandb, or leave the setting out; "
            "metrics.jsonl and TensorBoard hold the same numbers"
        )


class WandbLog:
    """One run of W&B for each stage; the stages of a workdir are a group.

    Its id is in the stage's directory, so that an interrupted run resumes under it. Steps are a metric of
    their own ("step"), since W&B refuses to log a step that it has seen, as those after a checkpoint are.

    Args:
      project: of W&B.
      directory: of the stage.
      config: the run's, JSON-ready.

    Raises:
      ConfigError: W&B refuses; says why.
    """

    def __init__(self, project: str, directory: epath.Path, config: Mapping[str, Any]):
        check_wandb(project)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "wandb_id.txt"
        if not path.exists():
            path.write_text(secrets.token_hex(8))
        workdir = directory.parent.name
        try:
            self._run = importlib.import_module("wandb").init(
                project=project,
                id=path.read_text().strip(),
                resume="allow",
                name=f"{workdir}/{directory.name}",
                group=workdir,
                dir=None if "://" in str(directory) else str(directory),
                config=dict(config),
            )
        except Exception as error:  # of its own kinds, and those of the network
            raise ConfigError(
                f"W&B did not start: {str(error).rstrip('.')}; log in with `wandb login`, set WANDB_MODE=offline, or "
                "leave --config.training.wandb out"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, kind: str, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step, **{f"{kind}/{name}": value for name, value in numbers.items()}})

    def close(self) -> None:
        self._run.finish()
