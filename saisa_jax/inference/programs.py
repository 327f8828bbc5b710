"""The programs that answer many questions, batch by batch (`inference/batches.py`): they encode, answer and collect.

Axes: B rows of a batch, W ways (devices along "data" and "fsdp") over which they are split, E pictures that a way
encodes at once, C slots of its ring of pictures, A what is stacked for a picture: layers, or 1 for features.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saisa_jax import parallel
from saisa_jax.config import ModelConfig
from saisa_jax.inference.generate import GREEDY, Generator, bucket
from saisa_jax.inference.memory import kv_heads_axis
from saisa_jax.models.kv_cache import ImageKV, next_positions
from saisa_jax.models.saisa import Saisa


class Programs:
    """What is compiled to answer batches.

    Args:
      generator: of the model.
      mesh: that holds it; None: one device does.
      ways: over which rows are split.
      max_new_tokens: of an answer.
    """

    def __init__(self, generator: Generator, mesh: Mesh | None, ways: int, max_new_tokens: int):
        self._generator, self._mesh, self._ways, self._limit = generator, mesh, ways, max_new_tokens
        everywhere = None if mesh is None else parallel.replicated(mesh)
        heads = kv_heads_axis(generator.config, mesh) if mesh is not None and generator.caches_images else None
        self._of_ring = PartitionSpec(None, parallel.BATCH_AXES, None, heads)
        self.encode = jax.jit(self._run_encode, donate_argnames="pool")
        self.answer = jax.jit(self._run_answer)
        self.collect = jax.jit(lambda tokens, words: (tokens, words.max(axis=1)), out_shardings=everywhere)

    def pool(self, config: ModelConfig, params: Any, capacity: int) -> Any:
        """Shapes of the rings of all ways: leaves [A, W, C, ...]."""
        size = config.vision.image_size
        of_one = jax.eval_shape(self.of_pictures, params, jax.ShapeDtypeStruct((1, size, size, 3), np.uint8))
        sharding = None if self._mesh is None else NamedSharding(self._mesh, self._of_ring)

        def ring(leaf: Any) -> Any:
            shape = (leaf.shape[0], self._ways, capacity, *leaf.shape[2:])
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(ring, of_one)

    def of_pictures(self, params: Any, pixels: Any) -> Any:
        """What the text reads of pictures [I, size, size, 3]: keys and values, or features [1, I, P, C]."""
        if self._generator.caches_images:
            return self._generator.image_kv(params, pixels)
        return self._generator.apply(params, pixels, method=lambda model, x: model.encode_images(x[:, None]))[None]

    def _run_encode(self, params: Any, pixels: Any, first: Any, pool: Any) -> Any:
        """The pool with pictures [W, E, size, size, 3] in the slots from `first` [W] on; from -1 on: as it was."""
        new = self.of_pictures(params, pixels.reshape(-1, *pixels.shape[2:]))

        def put(kept: Any, some: Any, first: Any) -> Any:
            """Of one way. A slice is written where it lies; a scatter, which takes any slots, may copy the ring."""
            place = (0, 0, jnp.maximum(first[0], 0), *[0] * (kept.ndim - 3))
            before = jax.lax.dynamic_slice(kept, place, some.shape)
            return jax.lax.dynamic_update_slice(kept, jnp.where(first < 0, before, some.astype(kept.dtype)), place)

        if self._mesh is not None:  # each device has one way
            ring = self._of_ring
            specs = (ring, ring, PartitionSpec(parallel.BATCH_AXES))
            put = jax.shard_map(put, mesh=self._mesh, in_specs=specs, out_specs=ring, check_vma=False)
        ways = lambda some: some.reshape(some.shape[0], *pixels.shape[:2], *some.shape[2:])  # noqa: E731
        return jax.tree.map(lambda kept, some: put(kept, ways(some), first), pool, new)

    def _run_answer(self, params: Any, batch: Any, slots: Any, pool: Any) -> Any:
        """Tokens [B, capacity]. `slots` [B, M] count within the row's way."""
        features = image_kv = None
        if pool is None:  # no pictures
            features = jnp.zeros((slots.shape[0], 0, self._generator.config.vision.embed_dim), jnp.float32)
        else:

            def pick(kept: Any) -> Any:
                """[A, W, C, ...] to [A, B, M, ...], without leaving the way."""
                of_ways = slots.reshape(self._ways, -1, slots.shape[1])
                picked = jax.vmap(lambda kept, slots: kept[:, slots], in_axes=(1, 0), out_axes=1)(kept, of_ways)
                return picked.reshape(picked.shape[0], slots.shape[0], *picked.shape[3:])

            picked = jax.tree.map(pick, pool)
            if self._generator.caches_images:  # [Lv, B, M, K, P, H] to [Lv, B, K, V, H]
                join = lambda x: (y := jnp.moveaxis(x, 2, 3)).reshape(*y.shape[:3], -1, y.shape[-1])  # noqa: E731
                image_kv = ImageKV(*map(join, picked))
            else:
                features = picked[0].reshape(slots.shape[0], -1, picked.shape[-1])
        room = bucket(self._limit)
        logits, cache = self._generator.apply(params, batch, room, features, image_kv, method=Saisa.prefill)
        padding = jnp.max(batch["segment_ids"], axis=1) == 0
        positions, (temperature, top_p) = next_positions(cache), GREEDY
        return self._generator.decode(
            params, logits, cache, positions, padding, jax.random.key(0), self._limit, temperature, top_p, room
        )


programs_of = functools.lru_cache(maxsize=4)(Programs)  # the next task of a model compiles nothing of a like size
