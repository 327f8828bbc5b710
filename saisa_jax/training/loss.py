"""The training loss: next-token cross-entropy, weighted per token, over the whole global batch; KL to a teacher."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Sums = tuple[Float[Array, ""], Float[Array, ""]]


def cross_entropy(logits: Float[Array, "B T W"], targets: Int[Array, "B T"], weights: Float[Array, "B T"]) -> Sums:
    """Sum of weighted negative log-likelihoods, and sum of weights.

    The loss is their quotient over the whole global batch, never a mean of means. Logits are float32; entries of -inf
    (the vocabulary's padding) take no part.
    """
    logits = logits.astype(jnp.float32)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    # A sum over the one that is chosen: its gradient is no scatter, and a sharded vocabulary is not gathered.
    chosen = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0.0), axis=-1)
    # `where` before the product: a token without weight may have any target.
    nll = jnp.where(weights > 0, normalizer - chosen, 0.0)
    return jnp.sum(weights * nll), jnp.sum(weights)


def chunked_cross_entropy(
    head: Callable[[Any], Any],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
) -> Sums:
    """`cross_entropy` of `head(hidden)`, whose logits never exist at once, neither forward nor backward.

    Args:
      head: makes float32 logits [B, t, W] of any t positions [B, t, D].
      hidden: what the head reads.
      targets: as for `cross_entropy`.
      weights: as for `cross_entropy`.
      chunk: at most so many positions of a row have logits at the same time; 0: all of them.
    """
    return _in_chunks(lambda x, *of_tokens: cross_entropy(head(x), *of_tokens), (hidden, targets, weights), chunk)


def divergence(
    logits: Float[Array, "B T W"],
    taught: Float[Array, "B T W"],
    weights: Float[Array, "B T"],
    temperature: float = 1.0,
) -> Float[Array, ""]:
    """Sum of weighted t^2 KL(softmax(taught / t) || softmax(logits / t)), in nats (Hinton et al., arXiv 1503.02531).

    The factor keeps the size of the gradient as t grows. Entries of -inf in both take no part.
    """
    log_p, log_q = (jax.nn.log_softmax(x.astype(jnp.float32) / temperature, axis=-1) for x in (taught, logits))
    outside = taught == -jnp.inf
    kl = jnp.sum(jnp.exp(log_p) * jnp.where(outside, 0.0, log_p - log_q), axis=-1)
    return temperature**2 * jnp.sum(weights * jnp.where(weights > 0, kl, 0.0))


def chunked_distillation(
    heads: tuple[Callable[[Any], Any], Callable[[Any], Any]],
    hidden: tuple[Float[Array, "B T D"], Float[Array, "B T D"]],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
    temperature: float,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Sums of `cross_entropy` of a student, of its weights, and of its `divergence` from a teacher.

    Args:
      heads: of student and teacher; as for `chunked_cross_entropy`, like all that follow.
      hidden: what they read.
      temperature: of the divergence.
    """

    def sums(student: Any, teacher: Any, targets: Any, weights: Any) -> Any:
        logits, taught = heads[0](student), jax.lax.stop_gradient(heads[1](teacher))
        return *cross_entropy(logits, targets, weights), divergence(logits, taught, weights, temperature)

    return _in_chunks(sums, (*hidden, targets, weights), chunk)


def _in_chunks(sums_of: Callable[..., Any], arrays: tuple[Any, ...], chunk: int) -> Any:
    """The sums that a function makes of arrays [B, T, ...], from at most `chunk` positions of a row at a time."""
    length = arrays[0].shape[1]
    count = math.ceil(length / chunk) if chunk else 1
    if count == 1:
        return sums_of(*arrays)
    size = math.ceil(length / count)

    def cut(x: Any) -> Any:
        """[B, T, ...] -> [count, B, size, ...], padded with tokens of weight 0."""
        x = jnp.pad(x, [(0, 0), (0, count * size - length), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    pieces = tuple(map(cut, arrays))
    none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(sums_of, *(x[0] for x in pieces)))

    def add(sums: Any, piece: Any) -> Any:
        return jax.tree.map(jnp.add, sums, sums_of(*piece)), None

    # Kept for the backward pass would be the logits; they are made once more instead.
    add = jax.checkpoint(add, prevent_cse=False)
    return jax.lax.scan(add, none, pieces)[0]
