"""The state of training: two trees of parameters, the optimizer's moments and the step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from saisa_jax import parallel
from saisa_jax.checkpoints import CheckpointError
from saisa_jax.config import Groups, ModelConfig
from saisa_jax.models.saisa import abstract_params
from saisa_jax.training.optimizer import flatten, split, unflatten

Params = Any


class TrainState(NamedTuple):
    """`frozen` has no gradient, no moments and no second copy; `trainable` has all three.

    `teacher` is what a teacher has of its own, beside frozen parameters (`distill.py`); None: there is no teacher.
    """

    step: Any  # int32 scalar
    trainable: Params
    frozen: Params
    opt_state: Any
    teacher: Params = None


def param_shardings(config: ModelConfig, mesh: Mesh, rules: parallel.Rules) -> Params:
    """Where each parameter lives."""
    return parallel.shardings_of(abstract_params(config, boxed=True), mesh, rules)


def state_shardings(
    config: ModelConfig, groups: Groups, optimizer: Any, mesh: Mesh, rules: parallel.Rules
) -> TrainState:
    """Where each leaf of the state lives: moments where their parameters do, scalars everywhere."""
    abstract = abstract_params(config)
    abstract_state = jax.eval_shape(lambda params: make_state(params, groups, optimizer), abstract)
    flat = flatten(param_shardings(config, mesh, rules))
    everywhere = parallel.replicated(mesh)

    def like_params(tree: Params) -> Params:
        return unflatten({path: flat[path] for path in flatten(tree)}) if tree else {}

    def of_moments(path: Any, leaf: Any) -> Any:
        # A moment's path ends in its parameter's path; anything else of the optimizer is a scalar.
        keys = "/".join(str(entry.key) for entry in path if hasattr(entry, "key"))
        return next((flat[name] for name in _suffixes(keys) if name in flat and leaf.ndim), everywhere)

    return TrainState(
        step=everywhere,
        trainable=like_params(abstract_state.trainable),
        frozen=like_params(abstract_state.frozen),
        opt_state=jax.tree_util.tree_map_with_path(of_moments, abstract_state.opt_state),
    )


def _suffixes(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[i:]) for i in range(len(parts))]


def make_state(params: Params, groups: Groups, optimizer: Any) -> TrainState:
    """Parts the parameters into trainable and frozen, and gives the first its moments."""
    trainable, frozen = split(params, groups)
    return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, optimizer.init(trainable))


def saved_part(state: TrainState) -> dict[str, Any]:
    """What a checkpoint of the run holds: all but what is fixed, which it names by checksums."""
    return {name: getattr(state, name) for name in ("step", "trainable", "opt_state")}


def fixed_part(state: TrainState) -> Params:
    """What a run never changes, whose checksums its checkpoints name: frozen parameters, and the teacher's own."""
    return state.frozen if state.teacher is None else {**state.frozen, "teacher": state.teacher}


def abstract_saved(state: TrainState) -> dict[str, Any]:
    """Shapes, dtypes and shardings of `saved_part`: what to restore."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved_part(state))


def check_frozen(saved: Mapping[str, int], now: Mapping[str, int], source: str, directory: str) -> None:
    """Raises CheckpointError where frozen parameters are not those that a checkpoint was trained with, by checksum."""
    differing = [path for path in now if saved.get(path) != now[path]]
    if differing:
        raise CheckpointError(
            f"frozen parameters of {source} are not those that {directory} was trained with: "
            f"{', '.join(differing)}; bring them back, or start in another --workdir"
        )


def create_state(
    make_params: Callable[[Any], Params],
    argument: Any,
    groups: Groups,
    optimizer: Any,
    shardings: TrainState,
    donate: bool = False,
) -> TrainState:
    """The first state, born sharded: `make_params(argument)` runs under the same jit, whole on no single device.

    A teacher is not in it.

    Args:
      donate: the argument's arrays may become the state's, so that they are not in memory twice.
    """

    def first_state(argument: Any) -> TrainState:
        return make_state(make_params(argument), groups, optimizer)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")  # those that change their dtype
        shardings = shardings._replace(teacher=None)
        return jax.jit(first_state, out_shardings=shardings, donate_argnums=0 if donate else ())(argument)
