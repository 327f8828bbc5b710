"""One step of training, and one of held-out evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from saisa_jax.batch import Batch
from saisa_jax.config import ModelConfig, Teacher
from saisa_jax.models.layers import constrain
from saisa_jax.models.pairs import shares
from saisa_jax.models.saisa import Saisa
from saisa_jax.training.distill import teacher_params
from saisa_jax.training.loss import chunked_cross_entropy, chunked_distillation
from saisa_jax.training.optimizer import Optimizer, merge
from saisa_jax.training.state import TrainState

Metrics = dict[str, Any]


def make_train_step(
    config: ModelConfig,
    optimizer: Optimizer,
    shardings: TrainState,
    accumulation: int = 1,
    loss_chunk: int = 0,
    teacher: Teacher | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A jitted (state, batch) -> (state, metrics). The state is donated.

    Gradients are taken of the trainable tree alone: nothing runs backward through what only frozen parameters need.
    A step whose loss or gradient is not finite changes nothing but the step counter.

    Metrics: loss, tokens (sum of loss weights), grad_norm (before clipping), lr, skipped (1.0: nothing was changed),
    what the batch held (`held_by`), and how much of attention's pairs was legal and how much was computed (0..1). With
    a teacher also cross_entropy and kl, of which the loss is made.

    Args:
      config: the model.
      optimizer: of `make_optimizer`.
      shardings: of `state_shardings`.
      accumulation: micro-batches that the batch is read in, one after the other.
      loss_chunk: positions of a row that have logits at the same time; 0: all.
      teacher: of the stage; None: there is none.
    """
    sums = sums_of(config, loss_chunk, teacher)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def gradient_of(rows: Batch) -> Any:
            return jax.value_and_grad(sums, has_aux=True)(state.trainable, state.frozen, rows, state.teacher)

        (total, parts), gradients = _accumulate(gradient_of, batch, accumulation, state.trainable, shardings)
        weight = parts.pop("tokens")
        divisor = jnp.maximum(weight, 1.0)
        loss = total / divisor
        norm = optax.tree.norm(optax.tree.cast(gradients, jnp.float32)) / divisor
        good = jnp.isfinite(loss) & jnp.isfinite(norm)

        # A branch, not a choice between old and new numbers: those would be in memory at the same time.
        def updated(trainable: Any, opt_state: Any, gradients: Any) -> tuple[Any, Any]:
            means = optax.tree.scale(1.0 / divisor, optax.tree.cast(gradients, jnp.float32))
            updates, opt_state = optimizer.update(means, opt_state, trainable, norm=norm)
            return optax.apply_updates(trainable, updates), opt_state

        trainable, opt_state = jax.lax.cond(
            good, updated, lambda *kept: kept[:2], state.trainable, state.opt_state, gradients
        )
        legal, visited = shares(config, batch, teacher)
        metrics = {
            "loss": loss,
            **{name: part / divisor for name, part in parts.items()},
            "tokens": weight,
            "grad_norm": norm,
            "lr": optimizer.learning_rate(state.opt_state),
            "skipped": 1.0 - good,
            **held_by(batch),
            "attention_legal": legal,
            "attention_visited": visited,
        }
        return TrainState(state.step + 1, trainable, state.frozen, opt_state, state.teacher), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def held_by(batch: Batch) -> Metrics:
    """{samples} of a batch, and {text_fill, image_fill}: how much of its positions and slots hold something (0..1)."""
    segments, images = batch["segment_ids"], batch["image_segment_ids"]
    before = jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
    return {
        "samples": jnp.sum((segments > 0) & (segments != before)),
        "text_fill": jnp.mean(segments > 0),
        **({"image_fill": jnp.mean(images > 0)} if images.size else {}),
    }


def make_eval_step(config: ModelConfig, loss_chunk: int = 0) -> Callable[[Any, Any, Batch], tuple[Any, Any]]:
    """A jitted (trainable, frozen, batch) -> (sum of losses, sum of weights)."""
    sums = sums_of(config, loss_chunk)

    def eval_step(trainable: Any, frozen: Any, batch: Batch) -> tuple[Any, Any]:
        total, parts = sums(trainable, frozen, batch)
        return total, parts["tokens"]

    return jax.jit(eval_step)


def sums_of(
    config: ModelConfig, loss_chunk: int, teacher: Teacher | None = None
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """The loss as it is differentiated: (trainable, frozen, rows, the teacher's own) -> (sum of losses, other sums).

    The other sums are {"tokens"}: of weights; with a teacher also {"cross_entropy", "kl"}, and the sum of losses is
    that of cross_entropy + weight * kl. Features of images are computed once for both where both have one encoder.
    """
    model = Saisa(config)

    def loss_sums(trainable: Any, frozen: Any, rows: Batch, own: Any = None) -> tuple[Any, dict[str, Any]]:
        apply = functools.partial(model.apply, {"params": merge(trainable, frozen)})
        head, answers = functools.partial(apply, method=Saisa.head), (rows["targets"], rows["loss_weights"])
        if teacher is None:
            hidden, _ = apply(rows, method=Saisa.hidden)
            total, weight = chunked_cross_entropy(head, hidden, *answers, loss_chunk)
            return total, {"tokens": weight}
        features = apply(rows["images"], method=Saisa.encode_images)
        hidden, _ = apply(rows, features, method=Saisa.hidden)
        teach = functools.partial(Saisa(teacher.model).apply, {"params": teacher_params(teacher, own, frozen)})
        taught, _ = teach(rows, None if "vision" in own else features, method=Saisa.hidden)
        heads = head, functools.partial(teach, method=Saisa.head)
        states = hidden, jax.lax.stop_gradient(taught)
        nll, weight, kl = chunked_distillation(heads, states, *answers, loss_chunk, teacher.temperature)
        return nll + teacher.weight * kl, {"tokens": weight, "cross_entropy": nll, "kl": kl}

    return loss_sums


def _accumulate(
    gradient_of: Callable[[Batch], Any], batch: Batch, parts: int, trainable: Any, shardings: TrainState
) -> Any:
    """The sum of ((loss, other sums), gradients) over micro-batches; as they are sums, the split changes nothing."""
    if parts == 1:
        return gradient_of(batch)
    gradients = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trainable)
    gradients = jax.lax.with_sharding_constraint(gradients, shardings.trainable)
    rows = micro_batches_of(batch, parts)
    sums, _ = jax.eval_shape(gradient_of, jax.tree.map(lambda x: x[0], rows))
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums), gradients
    add = lambda sums, rows: (jax.tree.map(jnp.add, sums, gradient_of(rows)), None)  # noqa: E731
    return jax.lax.scan(add, start, rows)[0]


def micro_batches_of(batch: Any, parts: int) -> Any:
    """[B, ...] -> [parts, B / parts, ...]: row i goes to part i mod parts.

    So every device, which holds neighbouring rows, has as many of each part, and no row moves to another device.
    """

    def interleave(x: Any) -> Any:
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "activation_batch", *[None] * (x.ndim - 2))

    return jax.tree.map(interleave, batch)
