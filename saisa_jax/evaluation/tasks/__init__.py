"""Benchmarks, one a file; `get` finds one by its name."""

from __future__ import annotations

import difflib
import importlib

from saisa_jax.config import ConfigError
from saisa_jax.evaluation.tasks.task import Item, Task

__all__ = ["Item", "Task", "get"]

_MODULES = {"easy_vqa": "saisa_jax.evaluation.tasks.easy_vqa"}  # imported when it is asked for; it has a `TASK`


def get(name: str) -> Task:
    """The benchmark of that name.

    Raises:
      ConfigError: there is none.
    """
    if name not in _MODULES:
        near = difflib.get_close_matches(name, _MODULES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"--task={name} is not one of {', '.join(_MODULES)}{hint}")
    return importlib.import_module(_MODULES[name]).TASK
