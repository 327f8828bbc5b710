"""The training loss: next-token cross-entropy, weighted per token, over the whole global batch."""

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
    length = hidden.shape[1]
    count = math.ceil(length / chunk) if chunk else 1
    if count == 1:
        return cross_entropy(head(hidden), targets, weights)
    size = math.ceil(length / count)

    def cut(x: Any) -> Any:
        """[B, T, ...] -> [count, B, size, ...], padded with tokens of weight 0."""
        x = jnp.pad(x, [(0, 0), (0, count * size - length), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    def add(sums: Any, piece: Any) -> Any:
        hidden, targets, weights = piece
        return jax.tree.map(jnp.add, sums, cross_entropy(head(hidden), targets, weights)), None

    # Kept for the backward pass would be the logits; they are made once more instead.
    add = jax.checkpoint(add, prevent_cse=False)
    sums, _ = jax.lax.scan(add, (jnp.zeros(()), jnp.zeros(())), (cut(hidden), cut(targets), cut(weights)))
    return sums
