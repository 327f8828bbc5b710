"""What generation caches: the image's keys and values, and one preallocated buffer for the text.

Under all alignments but LLaVA the image part depends on the image alone: `ImageKV` is computed once for an image and
used for every question about it (`inference/image_cache.py`); `VisualKV` is its copy at the positions of a row. Under
LLaVA the visual tokens are part of the query stream: their keys depend on the text before them, stand at the front of
the text buffer, and cannot be reused for another prompt; `visual` is None.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class ImageKV(NamedTuple):
    """Keys, not rotated, and values of images, for the layers that attend to them (Lv): valid at any position."""

    k: Float[Array, "Lv I K P H"]
    v: Float[Array, "Lv I K P H"]


class VisualKV(NamedTuple):
    """Keys, rotated to their rows' positions (of Flamingo's images alone: not), and values of visual tokens for the
    layers that attend to them."""

    k: Float[Array, "Lv B K V H"]
    v: Float[Array, "Lv B K V H"]
    positions: Int[Array, "B V"]
    segment_ids: Int[Array, "B V"]


class KVCache(NamedTuple):
    """Keys (rotated) and values of the query stream; columns whose segment is 0 are empty.

    Behind the decoder's L layers stand Flamingo's cross layers that read the text (`ModelConfig.num_cached_layers`).
    """

    k: Float[Array, "L B K S H"]
    v: Float[Array, "L B K S H"]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    length: Int[Array, ""] | Int[Array, " B"]  # columns in use: the same for every row, or each row's own (a server's)
    visual: VisualKV | None


def next_positions(cache: KVCache) -> Int[Array, " B"]:
    """The position after the last one that each row holds."""
    return jnp.max(jnp.where(cache.segment_ids > 0, cache.positions, -1), axis=1) + 1


def gather_images(image_kv: ImageKV, slots: Int[Array, "B M"]) -> ImageKV:
    """The images of every row's slots as [Lv, B, K, V, H], V = M * P; `slots` are indices into I."""

    def rows(x: Float[Array, "Lv I K P H"]) -> Float[Array, "Lv B K V H"]:
        picked = jnp.moveaxis(x[:, slots], 2, 3)  # [Lv, B, K, M, P, H]
        return picked.reshape(*picked.shape[:3], -1, picked.shape[-1])

    return ImageKV(rows(image_kv.k), rows(image_kv.v))


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

    Columns of padding, on the right, are written and not counted: the next ones overwrite them. The caller makes sure
    that all T fit: `generate` allocates room for every token it may generate.
    """
    if cache.length.ndim:  # row by row: XLA writes such a chain in place, and a scatter into a copy of the whole cache

        def put(old: jax.Array, new: jax.Array, rows: int) -> jax.Array:
            new = new.astype(old.dtype)
            for row in range(old.shape[rows]):
                start = (0, row, 0, cache.length[row], 0) if rows else (row, cache.length[row])
                old = jax.lax.dynamic_update_slice(old, jax.lax.slice_in_dim(new, row, row + 1, axis=rows), start)
            return old

        return cache._replace(
            k=put(cache.k, k, 1),
            v=put(cache.v, v, 1),
            positions=put(cache.positions, positions, 0),
            segment_ids=put(cache.segment_ids, segment_ids, 0),
            length=cache.length + jnp.sum(segment_ids > 0, axis=1),
        )
    update = jax.lax.dynamic_update_slice_in_dim
    return cache._replace(
        k=update(cache.k, k.astype(cache.k.dtype), cache.length, 3),
        v=update(cache.v, v.astype(cache.v.dtype), cache.length, 3),
        positions=update(cache.positions, positions, cache.length, 1),
        segment_ids=update(cache.segment_ids, segment_ids, cache.length, 1),
        length=cache.length + (jnp.max(jnp.sum(segment_ids > 0, axis=1)) if k.shape[3] > 1 else 1),
    )


def rewind(cache: KVCache, length: Int[Array, ""]) -> KVCache:
    """The cache as it was when its first `length` columns were in use."""
    kept = jnp.arange(cache.segment_ids.shape[1]) < length
    return cache._replace(segment_ids=jnp.where(kept, cache.segment_ids, 0), length=jnp.asarray(length, jnp.int32))


def grow(cache: KVCache, extra: int) -> KVCache:
    """The cache with room for `extra` more columns than it has."""
    return allocate(cache.k, cache.v, cache.positions, cache.segment_ids, cache.visual, extra)._replace(
        length=cache.length
    )
