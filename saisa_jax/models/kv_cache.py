"""What generation remembers: the image's keys and values, and one preallocated buffer for the text.

Under SAISA and NAAViT the image part depends on the image alone; it is written once and only read. Under LLaVA the
visual tokens are part of the stream that asks: their keys stand at the front of the text buffer, and `visual` is None.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class VisualKV(NamedTuple):
    """Keys and values of visual tokens for the layers that see them (Lv of them)."""

    k: Float[Array, "Lv B K V H"]
    v: Float[Array, "Lv B K V H"]
    positions: Int[Array, "B V"]
    segment_ids: Int[Array, "B V"]


class KVCache(NamedTuple):
    """Keys (rotated) and values of the stream that asks; columns whose segment is 0 are empty."""

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K S H"]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    length: Int[Array, ""]  # columns in use, the same for every row
    visual: VisualKV | None


def allocate(
    k: Float[Array, "L B K T H"],
    v: Float[Array, "L B K T H"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    visual: VisualKV | None,
    extra: int,
) -> KVCache:
    """A cache that holds a prompt's keys and values, with room for `extra` more tokens a row."""

    def room(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)])

    length = jnp.asarray(k.shape[3], jnp.int32)
    return KVCache(room(k, 3), room(v, 3), room(positions, 1), room(segment_ids, 1), length, visual)


def append(
    cache: KVCache,
    k: Float[Array, "L B K T H"],
    v: Float[Array, "L B K T H"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> KVCache:
    """Writes T new columns behind the last one (in place, inside the loop of `generate`).

    The caller sees to it that they fit: `generate` allocates room for every token that it will ask for.
    """
    update = jax.lax.dynamic_update_slice_in_dim
    return cache._replace(
        k=update(cache.k, k.astype(cache.k.dtype), cache.length, 3),
        v=update(cache.v, v.astype(cache.v.dtype), cache.length, 3),
        positions=update(cache.positions, positions, cache.length, 1),
        segment_ids=update(cache.segment_ids, segment_ids, cache.length, 1),
        length=cache.length + k.shape[3],
    )
