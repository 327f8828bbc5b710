"""What a stage of training is before any array exists: a run fills it with arrays, a plan compiles it without."""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
from absl import logging
from jax.sharding import Mesh

from saisa_jax import parallel
from saisa_jax.batch import Batch, empty_batch
from saisa_jax.config import Config, ConfigError, ModelConfig, StageConfig, Teacher
from saisa_jax.models.saisa import abstract_params
from saisa_jax.training.distill import abstract_own, own_shardings
from saisa_jax.training.memory import lightest_remat, room
from saisa_jax.training.optimizer import make_optimizer, split
from saisa_jax.training.state import TrainState, make_state, state_shardings


class StageSetup(NamedTuple):
    """A stage on a mesh."""

    name: str
    settings: StageConfig
    model: ModelConfig  # while the stage trains it; nothing of it is `auto`
    mesh: Mesh
    rules: parallel.Rules
    optimizer: Any
    shardings: TrainState
    teacher: Teacher | None = None

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        groups, optimizer = self.settings.groups, self.optimizer
        state = jax.eval_shape(lambda params: make_state(params, groups, optimizer), abstract_params(self.model))
        if self.teacher is not None:
            state = state._replace(teacher=abstract_own(self.teacher, state.frozen))
        return jax.tree.map(_placed, state, self.shardings)

    def abstract_batch(self) -> Batch:
        """Shapes, dtypes and shardings of a global batch."""
        s = self.settings
        batch = empty_batch(s.batch_size, s.text_length, s.max_images, self.model.image_slot)
        sharding = parallel.batch_sharding(self.mesh)
        return jax.tree.map(lambda x: _placed(x, sharding), batch)


def compiled_meanwhile(traced: Any, stage: StageSetup) -> Future[None] | None:
    """Compiles a traced step in a thread, so that weights and checkpoints are read at the same time.

    The step's first call finds the program. No process waits for another in this, and nothing runs on the devices. That
    is not so on GPUs, where XLA times kernels while it compiles, and processes share what they found: there the first
    call compiles (None).
    """
    if stage.mesh.devices.flat[0].platform in ("gpu", "cuda"):
        return None

    def compile_it() -> None:
        with parallel.use(stage.mesh, stage.rules):
            traced.lower().compile()

    thread = ThreadPoolExecutor(1, "compile")
    done = thread.submit(compile_it)
    thread.shutdown(wait=False)
    return done


def _placed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def setup_stage(config: Config, name: str, steps: int, devices: list[Any] | None = None) -> StageSetup:
    """Mesh, rules, optimizer and shardings of stage `name`, which takes `steps` steps.

    Args:
      devices: what the mesh is made of; None: all there are, of all processes, each of which calls this.

    Raises:
      ConfigError: rows or dimensions that do not divide by the mesh, parameters that no group takes.
    """
    settings, model = config.stage(name), config.trained_model(name)
    mesh = parallel.make_mesh(config.mesh, devices)
    rules = parallel.make_rules(model, mesh)
    model = dataclasses.replace(model, attention_impl=parallel.attention_of(model, mesh))
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * settings.accumulation
    if settings.batch_size % ways:
        raise ConfigError(
            f"{name}.batch_size={settings.batch_size} does not divide by mesh data x fsdp x "
            f"{name}.accumulation={settings.accumulation} = {ways}: "
            f"set --config.{name}.batch_size to {settings.batch_size // ways * ways + ways}"
        )
    trainable, _ = jax.eval_shape(lambda params: split(params, settings.groups), abstract_params(model))
    optimizer = make_optimizer(settings.optimizer, settings.groups, trainable, steps)
    shardings = state_shardings(model, settings.groups, optimizer, mesh, rules)
    teacher = config.teacher if name == "finetune" else None
    if teacher is not None:
        of_teacher = dataclasses.replace(teacher.model, attention_impl=parallel.attention_of(teacher.model, mesh))
        teacher = dataclasses.replace(teacher, model=of_teacher)
        shardings = shardings._replace(teacher=own_shardings(teacher, shardings.frozen, mesh, rules))
    stage = StageSetup(name, settings, model, mesh, rules, optimizer, shardings, teacher)
    if model.remat_policy != "auto":
        return stage
    available = room(mesh.devices.flatten().tolist())
    state, chunk = stage.abstract_state(), config.training.loss_chunk
    policy, because = lightest_remat(model, settings, mesh, state, chunk, available, teacher)
    logging.info("%s: model.remat_policy=auto is %s: %s", name, policy, because)
    return stage._replace(model=dataclasses.replace(model, remat_policy=policy))
