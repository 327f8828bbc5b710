"""NAAViT, "No Attention Among Visual Tokens" (paper section 3.1): the mask.

The whole of NAAViT is that visual tokens are keys and values and never queries. What a query may attend to is one line:

    may_attend(query, key) = (segment_q == segment_k) & (segment_k > 0) & (position_q >= position_k)

Worked example, "<s> <image> What ?" with two visual tokens: positions are <s> 0, v0 1, v1 2, What 3, ? 4.

               v0  v1 | <s> What  ?      Visual keys stand first, in a block of their own; their order does not matter,
        <s>     .   . |  1    .   .      since positions decide. Text before the image does not attend to it, text after
        What    1   1 |  1    1   .      attends to all. There are no rows for v0 and v1: they are not queries,
        ?       1   1 |  1    1   1      which is why an image costs no Q, no O and (under SAISA) no MLP.

Under LLaVA the visual tokens join the queries, and the same line makes their rows causal.
Axes: B batch, T queries, S keys, K key/value heads, H head_dim. `attention.py` applies the mask.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from flax import struct
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # The score of an illegal pair. Finite, so that a query without a legal key gives 0 and not NaN.


class PackedPositions(NamedTuple):
    """Where tokens stand: their positions in the interleaved sequence, and their segments (0 = padding)."""

    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]


@struct.dataclass
class Mask:
    """Which of S keys T queries may attend to, and the positions and segments that this follows from.

    `xla` and `cudnn` use `allowed`, made once for all layers. `flash` evaluates it tile by tile from positions and
    segments; then nothing reads `allowed`, and the compiler removes it.
    """

    queries: PackedPositions
    keys: PackedPositions
    allowed: Any  # bool [B, T, S]; not annotated, since trees of shapes and of shardings are Masks as well
    window: int | None = struct.field(pytree_node=False)


class KeyBlock(NamedTuple):
    """Keys and values that a layer's queries attend to: the image, the past, or the queries' own stream."""

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]
    mask: Mask


def make_mask(queries: Any, keys: Any, window: int | None = None) -> Mask:
    """The mask of every alignment.

    Args:
      queries: anything with `positions` and `segment_ids` [B, T]: a stream, a cache.
      keys: likewise [B, S].
      window: (Mistral) also hides keys that lie `window` or more positions back.
    """
    q, k = (PackedPositions(x.positions, x.segment_ids) for x in (queries, keys))
    return Mask(q, k, may_attend(*q, *k, window), window)


def without(mask: Mask, pairs: Bool[Array, "*pairs"]) -> Mask:
    """The mask without some pairs of query and key; for `xla` alone, since positions do not say so."""
    return dataclasses.replace(mask, allowed=mask.allowed & ~pairs)


def may_attend(
    query_positions: Int[Array, "B T"],
    query_segments: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    key_segments: Int[Array, "B S"],
    window: int | None = None,
) -> Bool[Array, "B T S"]:
    """Which query may attend to which key."""
    queries = query_positions[:, :, None], query_segments[:, :, None]
    return legal(*queries, key_positions[:, None], key_segments[:, None], window)


def legal(
    query_position: Any, query_segment: Any, key_position: Any, key_segment: Any, window: int | None = None
) -> Any:
    """The rule above, for integers that broadcast: the only place where it is written."""
    distance = query_position - key_position
    same_segment = (query_segment == key_segment) & (key_segment > 0)
    mask = same_segment & (distance >= 0)
    return mask if window is None else mask & (distance < window)
