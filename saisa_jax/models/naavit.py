"""NAAViT, "No Attention Among Visual Tokens" (paper section 3.1): the mask, and the one attention call.

The whole of NAAViT is that visual tokens are read and never ask. What a query may read is one line:

    may_attend(query, key) = (segment_q == segment_k) & (segment_k > 0) & (position_q >= position_k)

Worked example, "<s> <image> What ?" with two visual tokens: positions are <s> 0, v0 1, v1 2, What 3, ? 4.

               v0  v1 | <s> What  ?      Visual keys stand first, in a block of their own; their order does not matter,
        <s>     .   . |  1    .   .      since positions decide. Text before the image does not see it, text after it
        What    1   1 |  1    1   .      sees all of it. There are no rows for v0 and v1: visual tokens ask nothing,
        ?       1   1 |  1    1   1      which is why a picture costs no Q, no O and (under SAISA) no MLP.

Under LLaVA the visual tokens join the stream that asks, and the same line makes their rows causal.
Axes: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # Finite, so that a query without a legal key gives 0 and not NaN.


class KeyBlock(NamedTuple):
    """Keys and values that a layer's queries read: the image, the past, or the queries' own stream."""

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]
    mask: Bool[Array, "B T S"]


def may_attend(
    query_positions: Int[Array, "B T"],
    query_segments: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    key_segments: Int[Array, "B S"],
    window: int | None = None,
) -> Bool[Array, "B T S"]:
    """The mask of every alignment. `window` (Mistral) also hides keys that lie `window` or more positions back."""
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    same_segment = (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments[:, None, :] > 0)
    mask = same_segment & (distance >= 0)
    return mask if window is None else mask & (distance < window)


def attend(
    q: Float[Array, "B T N H"], blocks: Sequence[KeyBlock], impl: str = "xla"
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T _"] | None]:
    """Softmax attention over several blocks of keys at once, jointly normalised, nothing concatenated but weights.

    Scores and softmax are float32. A query without any legal key puts out exactly 0.

    Returns:
      The attention output in the dtype of `q`, and the float32 weights over all blocks in their order (unused weights
      are removed by the compiler).
    """
    if impl != "xla":
        raise ValueError(f"model.attention_impl={impl!r} is not implemented; known: 'xla'")
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = blocks[0].k.shape[1]
    grouped = q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim) * (head_dim**-0.5)

    scores = []
    for block in blocks:
        score = jnp.einsum("btkgh,bksh->bkgts", grouped, block.k, preferred_element_type=jnp.float32)
        scores.append(jnp.where(block.mask[:, None, None], score, MASKED))
    highest = jnp.max(jnp.stack([jnp.max(score, axis=-1) for score in scores]), axis=0)[..., None]
    highest = jax.lax.stop_gradient(jnp.maximum(highest, MASKED / 2))  # a query without a legal key: exp() gives 0
    weights = [jnp.exp(score - highest) for score in scores]
    total = sum(jnp.sum(weight, axis=-1, keepdims=True) for weight in weights)
    inverse = 1.0 / jnp.where(total == 0, 1.0, total)

    out = sum(
        jnp.einsum("bkgts,bksh->btkgh", weight.astype(q.dtype), block.v, preferred_element_type=jnp.float32)
        for weight, block in zip(weights, blocks, strict=True)
    )
    out = out * jnp.moveaxis(inverse, 3, 1)  # [B, K, G, T, 1] -> [B, T, K, G, 1]
    attention = (jnp.concatenate(weights, axis=-1) * inverse).reshape(batch, num_heads, length, -1)
    return out.reshape(q.shape).astype(q.dtype), attention
