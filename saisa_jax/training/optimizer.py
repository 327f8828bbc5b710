"""What trains, and how: ordered (regex, group) rows, and AdamW over the trainable parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from saisa_jax.config import ConfigError, GroupConfig, Groups, OptimizerConfig

Params = Any
NO_DECAY = ("bias", "scale", "scale1", "scale2", "attn_gate", "mlp_gate")  # norms, biases, layer scales, gates


def flatten(params: Params) -> dict[str, Any]:
    """A nested tree as {"layers/attn/q_proj/kernel": leaf}."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def assign_groups(params: Params, groups: Groups) -> dict[str, int]:
    """The row of `groups` that each parameter belongs to: the first whose regex matches its whole path.

    Raises:
      ConfigError: parameters that no row matches, all of them listed, and rows that match nothing.
    """
    patterns = [re.compile(pattern) for pattern, _ in groups]
    rows = {
        path: next((i for i, pattern in enumerate(patterns) if pattern.fullmatch(path)), None)
        for path in flatten(params)
    }
    orphans = [path for path, row in rows.items() if row is None]
    if orphans:
        raise ConfigError(
            f"{len(orphans)} parameters match no row of groups={[pattern for pattern, _ in groups]}: "
            f"{', '.join(orphans)}; end the list with ('.*', ...)"
        )
    idle = [pattern for i, (pattern, _) in enumerate(groups) if i not in rows.values()]
    if idle:
        raise ConfigError(f"rows of groups that match no parameter: {idle}; parameters are {', '.join(rows)}")
    return {path: row for path, row in rows.items() if row is not None}


def split(params: Params, groups: Groups) -> tuple[Params, Params]:
    """(trainable, frozen), each leaf in the dtype of its group."""
    rows = assign_groups(params, groups)
    trainable, frozen = {}, {}
    for path, leaf in flatten(params).items():
        group = groups[rows[path]][1]
        (frozen if group.frozen else trainable)[path] = leaf.astype(group.dtype)
    return unflatten(trainable), unflatten(frozen)


def merge(trainable: Params, frozen: Params) -> Params:
    """One tree again."""
    return unflatten({**flatten(trainable), **flatten(frozen)})


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then cosine or linear to `final_lr_fraction`, or constant.

    Step counts from 0. As in the Hugging Face trainer, a part of a step of warm-up is a whole one, and the first
    update of a warm-up has rate 0.
    """
    warmup = math.ceil(config.warmup_fraction * steps)
    end = config.lr * config.final_lr_fraction
    rest = max(1, steps - warmup)
    after = {
        "cosine": optax.cosine_decay_schedule(config.lr, rest, alpha=config.final_lr_fraction),
        "linear": optax.linear_schedule(config.lr, end, rest),
        "constant": optax.constant_schedule(config.lr),
    }[config.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, config.lr, max(1, warmup)), after], [warmup])


class Optimizer(NamedTuple):
    """An optax optimizer that also gives the rate of its next update."""

    init: Callable[[Params], Any]
    update: Callable[..., tuple[Params, Any]]  # (gradients, optimizer state, trainable, norm=of all gradients)
    learning_rate: Callable[[Any], Any]  # (optimizer state) -> rate; updates that were skipped do not count


def make_optimizer(config: OptimizerConfig, groups: Groups, trainable: Params, steps: int) -> Optimizer:
    """AdamW over the trainable tree: clipping over all of it, then each group's decay and rate."""
    rows = _rows_of_trainable(trainable, groups)

    def of_group(group: GroupConfig) -> optax.GradientTransformation:
        decay = config.weight_decay if group.weight_decay is None else group.weight_decay
        return optax.chain(optax.add_decayed_weights(decay, mask=_decays), optax.scale(group.lr_scale))

    labels = unflatten({path: str(row) for path, row in rows.items()})
    transforms: dict[Any, Any] = {str(row): of_group(groups[row][1]) for row in sorted(set(rows.values()))}
    schedule = make_schedule(config, steps)
    chain = optax.chain(
        _clip_by_global_norm(config.clip_norm),
        _adam(config),
        optax.multi_transform(transforms, labels),
        optax.scale_by_learning_rate(schedule),
    )
    return Optimizer(chain.init, chain.update, lambda state: jnp.asarray(schedule(state[-1].count)))


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """optax's clipping, for a caller that has measured the norm: no second pass over all gradients."""

    def update(updates: Params, state: Any, params: Any = None, **measured: Any) -> tuple[Params, Any]:
        factor = jnp.minimum(1.0, max_norm / measured["norm"])  # a norm of 0 has the factor 1
        return optax.tree.scale(factor, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam whose moments do not take after the parameters' dtype.

    The second moment is always float32: with b2 = 0.999 it shrinks by a thousandth a step, which bfloat16 rounds away,
    so that it would never come down again.
    """
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.first_moment_dtype)
    return optax.GradientTransformation(lambda params: adam.init(optax.tree.cast(params, jnp.float32)), adam.update)


def _rows_of_trainable(trainable: Params, groups: Groups) -> dict[str, int]:
    """As `assign_groups` for a tree that holds only what trains (rows of frozen groups match nothing in it)."""
    rows = {}
    for path in flatten(trainable):
        rows[path] = next(i for i, (pattern, _) in enumerate(groups) if re.fullmatch(pattern, path))
    return rows


def _decays(tree: Params) -> Params:
    def decays(path: Any, leaf: Any) -> bool:
        return not isinstance(leaf, optax.MaskedNode) and str(path[-1].key) not in NO_DECAY

    return jax.tree_util.tree_map_with_path(decays, tree, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode))
