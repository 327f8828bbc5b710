"""Generation: prefill and decode, one jit each, over a preallocated key/value cache.

Rows of different lengths share a batch: positions and segments, not the side of the padding, say who reads what. A
batch is compiled once for its bucket (rows, text length, image slots, new tokens), so a second batch of a like size
compiles nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from saisa_jax.batch import Batch
from saisa_jax.config import ModelConfig
from saisa_jax.models.kv_cache import KVCache
from saisa_jax.models.saisa import Saisa

SMALLEST_BUCKET = 16


def bucket(size: int, smallest: int = SMALLEST_BUCKET) -> int:
    """The next power of two, at least `smallest`: lengths are rounded up to it so that few programs are compiled."""
    return max(smallest, 1 << (size - 1).bit_length())


class Sampling(NamedTuple):
    """How a token is chosen: the best one at temperature 0, else from the smallest set of mass `top_p`."""

    temperature: float = 0.0
    top_p: float = 1.0


def sample(logits: Float[Array, "B W"], key: Any, temperature: Any, top_p: Any) -> Int[Array, " B"]:
    """One token a row. Temperature and top_p are traced: changing them compiles nothing."""

    def draw() -> Any:
        scaled = logits / jnp.maximum(temperature, 1e-6)
        ordered = jnp.sort(scaled, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        # A token stays if the mass before it is still below top_p; the best one always does.
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.sum(before < top_p, axis=-1, keepdims=True)
        least = jnp.take_along_axis(ordered, jnp.maximum(kept, 1) - 1, axis=-1)
        return jax.random.categorical(key, jnp.where(scaled >= least, scaled, -jnp.inf), axis=-1)

    best = lambda: jnp.argmax(logits, axis=-1)  # noqa: E731
    return jax.lax.cond(temperature > 0, draw, best).astype(jnp.int32)


GREEDY = Sampling()


class Generator:
    """Generates with one model; keeps its compiled programs.

    Args:
      config: the model.
      eos_ids: tokens that end an answer.
    """

    def __init__(self, config: ModelConfig, eos_ids: Sequence[int]):
        self.config = config
        self.eos_ids = tuple(eos_ids)
        self._model = Saisa(config)
        self._prefill = jax.jit(self._run_prefill, static_argnames="extra")
        self._decode = jax.jit(self._run_decode, static_argnames="capacity")

    def __call__(
        self, params: Any, batch: Batch, max_new_tokens: int, sampling: Sampling = GREEDY, seed: int = 0
    ) -> list[list[int]]:
        """New tokens of every row, up to and without its end token.

        Args:
          params: the model's parameters.
          batch: prompts (`pack_rows`); rows without any token are padding and give an empty list.
          max_new_tokens: the most tokens to generate.
          sampling: greedy by default.
          seed: of the sampling.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if not 0 < sampling.top_p <= 1 or sampling.temperature < 0:
            raise ValueError(f"{sampling}: temperature must be at least 0, and top_p in (0, 1]")
        capacity = bucket(max_new_tokens)
        logits, cache, positions = self._prefill(params, batch, extra=capacity)
        empty = np.asarray(batch["segment_ids"]).max(axis=1) == 0
        tokens = self._decode(
            params, logits, cache, positions, empty, jax.random.key(seed), max_new_tokens, *sampling, capacity=capacity
        )
        return [self._until_end(row) for row in np.asarray(tokens)]

    def _until_end(self, row: np.ndarray) -> list[int]:
        ended = np.flatnonzero(np.isin(row, (*self.eos_ids, -1)))
        return row[: ended[0] if len(ended) else None].tolist()

    def _run_prefill(self, params: Any, batch: Batch, extra: int) -> tuple[Any, KVCache, Any]:
        logits, cache = cast(
            "tuple[Any, KVCache]", self._model.apply({"params": params}, batch, extra, method=Saisa.prefill)
        )
        return logits, cache, jnp.max(jnp.where(cache.segment_ids > 0, cache.positions, -1), axis=1) + 1

    def _run_decode(
        self,
        params: Any,
        logits: Any,
        cache: KVCache,
        positions: Any,
        done: Any,
        key: Any,
        limit: Any,
        temperature: Any,
        top_p: Any,
        capacity: int,
    ) -> Any:
        """Tokens [B, capacity]; -1 where nothing was generated."""
        choose = functools.partial(sample, temperature=temperature, top_p=top_p)

        def emit(step: Any, out: Any, logits: Any, done: Any, key: Any) -> tuple[Any, Any, Any, Any]:
            key, now = jax.random.split(key)
            token = choose(logits, now)
            out = out.at[:, step].set(jnp.where(done, -1, token))
            return out, token, done | jnp.isin(token, jnp.asarray(self.eos_ids, jnp.int32)), key

        def unfinished(carry: Any) -> Any:
            step, _, _, done, _, _ = carry
            return (step < limit) & ~jnp.all(done)

        def one_more(carry: Any) -> Any:
            step, out, token, done, key, cache = carry
            logits, cache = self._model.apply(
                {"params": params}, token, positions + step - 1, cache, method=Saisa.decode
            )
            out, token, done, key = emit(step, out, logits, done, key)
            return step + 1, out, token, done, key, cache

        out = jnp.full((logits.shape[0], capacity), -1, jnp.int32)
        out, token, done, key = emit(0, out, logits, done, key)
        return jax.lax.while_loop(unfinished, one_more, (1, out, token, done, key, cache))[1]
