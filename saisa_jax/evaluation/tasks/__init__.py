"""Benchmarks, one a file: `TASKS.register("name")(Task(...))`."""

from __future__ import annotations

from saisa_jax.evaluation.tasks.task import Item, Task, TaskData
from saisa_jax.registry import Registry

__all__ = ["TASKS", "Item", "Task", "TaskData"]

TASKS: Registry[Task] = Registry("tasks", __name__)
