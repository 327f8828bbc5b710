"""One step of training, and one of held-out evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from saisa_jax.batch import Batch
from saisa_jax.config import ModelConfig
from saisa_jax.models.saisa import Saisa
from saisa_jax.training.loss import cross_entropy
from saisa_jax.training.optimizer import merge
from saisa_jax.training.state import TrainState

Metrics = dict[str, Any]


def make_train_step(
    config: ModelConfig, optimizer: Any, shardings: TrainState
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A jitted (state, batch) -> (state, metrics). The state is donated.

    Gradients are taken of the trainable tree alone: nothing runs backward through what only frozen parameters need.
    Metrics: loss, tokens (sum of loss weights), grad_norm (before clipping).
    """
    model = Saisa(config)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss_of(trainable: Any) -> tuple[Any, Any]:
            logits, _ = model.apply({"params": merge(trainable, state.frozen)}, batch)
            total, weight = cross_entropy(logits, batch["targets"], batch["loss_weights"])
            return total / jax.numpy.maximum(weight, 1.0), weight

        (loss, weight), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.trainable)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        new = TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), state.frozen, opt_state)
        return new, {"loss": loss, "tokens": weight, "grad_norm": optax.tree.norm(gradients)}

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_eval_step(config: ModelConfig) -> Callable[[Any, Any, Batch], tuple[Any, Any]]:
    """A jitted (trainable, frozen, batch) -> (sum of losses, sum of weights)."""
    model = Saisa(config)

    def step(trainable: Any, frozen: Any, batch: Batch) -> tuple[Any, Any]:
        logits, _ = model.apply({"params": merge(trainable, frozen)}, batch)
        return cross_entropy(logits, batch["targets"], batch["loss_weights"])

    return jax.jit(step)
