"""The training loss: next-token cross-entropy, weighted per token, over the whole global batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "B T W"], targets: Int[Array, "B T"], weights: Float[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of weighted negative log-likelihoods, and sum of weights.

    The loss is their quotient over the whole global batch, never a mean of means. Logits are float32; entries of -inf
    (the vocabulary's padding) take no part.
    """
    logits = logits.astype(jnp.float32)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    # `where` before the product: a token without weight may have any target.
    nll = jnp.where(weights > 0, normalizer - chosen, 0.0)
    return jnp.sum(weights * nll), jnp.sum(weights)
