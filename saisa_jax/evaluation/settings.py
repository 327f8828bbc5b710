"""How a benchmark is run: the flags of `eval.py`, and the fields `training.eval_*` while training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from saisa_jax.config import SCHOOLS, Config, ConfigError, EvaluationConfig
from saisa_jax.evaluation.tasks import TASKS, TaskData

FREE = ("batch_size", "image_cache_bytes")  # settings on which no answer depends


@dataclass(frozen=True)
class Settings:
    """How to run a benchmark.

    Attributes:
      batch_size: questions that are answered at once; None: as many as the devices' memory has room for.
      image_cache_bytes: of keys and values of pictures that stay on each device; None: what the memory has room for.
      max_new_tokens: of an answer.
      limit: only the first so many questions; None: all.
      quantize: how the weights were rounded; for the record.
      data: a file or folder that holds the questions; "": the task's own, or what the recipe names.
      images: what the names of its pictures lead into; "": beside it.
      prompts: the school of prompts and scores, one of `SCHOOLS`.
    """

    batch_size: int | None = None
    max_new_tokens: int = 16
    limit: int | None = None
    quantize: str | None = None
    data: str = ""
    images: str = ""
    prompts: str = "llava"
    image_cache_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens", "image_cache_bytes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"--{name}={value} must be at least 1")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit={self.limit} must be at least 1; leave it out for all questions")
        if self.prompts not in SCHOOLS:
            raise ConfigError(f"--prompts={self.prompts} is not one of {', '.join(SCHOOLS)}")
        if self.images and not self.data:
            raise ConfigError(f"--images={self.images} needs --data=FILE, whose pictures it holds")

    @classmethod
    def of(cls, name: str, recipe: EvaluationConfig, **given: Any) -> Settings:
        """The settings of a task; of what is not given, or None, the recipe's. A task that wants longer answers than
        the recipe's says so itself."""
        tokens = TASKS[name].max_new_tokens or recipe.max_new_tokens
        settings = {"batch_size": recipe.batch_size, "max_new_tokens": tokens, "limit": recipe.limit}
        return cls(**settings | {field: value for field, value in given.items() if value is not None})

    def place(self, name: str, config: Config, stage: str) -> TaskData:
        """Where the questions of a task lie, for a model that a stage of a recipe made."""
        return TaskData(self.data, self.images, config.stage(stage).validation, stage, self.prompts, name)
