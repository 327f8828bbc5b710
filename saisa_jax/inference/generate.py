"""Generation: encode images, prefill, decode, one jit each, over a preallocated key/value cache.

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
from jaxtyping import Array, Float, Int, UInt8

from saisa_jax.batch import Batch
from saisa_jax.config import ConfigError, ModelConfig
from saisa_jax.inference.quantize import variables_of
from saisa_jax.models.kv_cache import ImageKV, KVCache, VisualKV, gather_images
from saisa_jax.models.saisa import Saisa

SMALLEST_BUCKET = 16


def bucket(size: int, smallest: int = SMALLEST_BUCKET) -> int:
    """The next of smallest, 2 smallest, 4 smallest, ...: sizes are rounded up so that few programs are compiled."""
    return smallest << max(0, (-(-size // smallest) - 1).bit_length())


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


def check_sampling(sampling: Sampling) -> None:
    """Raises ConfigError for a temperature or a top_p that is none."""
    if not 0 < sampling.top_p <= 1 or sampling.temperature < 0:
        raise ConfigError(f"{sampling}: temperature must be at least 0, and top_p in (0, 1]")


class ImageSlots(NamedTuple):
    """Encoded images, and which of them stands in which slot of a batch.

    `images` are parts of [Lv, n, K, P, H]; `slots` [B, M] counts through them; what an empty slot (segment 0) says does
    not matter.
    """

    images: tuple[ImageKV, ...]
    slots: Any


class Generator:
    """Generates with one model; keeps its compiled programs.

    Under SAISA and NAAViT generation is always three programs: `encode` the images, `prefill` the text that reads them,
    decode; images that were encoded before skip the first. Under LLaVA images are encoded within `prefill`.

    Args:
      config: the model.
      eos_ids: tokens that end an answer, besides those of the model (`end_token_ids`).
      multiple_of: the least number of images that go through `encode`: the devices over which they are split.
    """

    def __init__(self, config: ModelConfig, eos_ids: Sequence[int], multiple_of: int = 1):
        self.config = config
        self.multiple_of = multiple_of
        self.eos_ids = tuple(dict.fromkeys((*eos_ids, *config.end_token_ids)))
        self._model = Saisa(config)
        self._encode = jax.jit(self._run_encode)
        self._split = jax.jit(
            lambda kv: [ImageKV(kv.k[:, i : i + 1], kv.v[:, i : i + 1]) for i in range(kv.k.shape[1])]
        )
        self._prefill = jax.jit(self._run_prefill, static_argnames="extra")
        self._decode = jax.jit(self.decode, static_argnames="capacity")
        self._place = jax.jit(self._run_place)
        self._extend = jax.jit(self._run_extend, donate_argnames="cache")
        self._step = jax.jit(self._run_step, donate_argnames="cache")
        self._sample = jax.jit(sample)

    @property
    def caches_images(self) -> bool:
        """Whether what the text reads of an image depends on the image alone."""
        return self.config.alignment != "llava"

    def __call__(
        self,
        params: Any,
        batch: Batch,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        images: ImageSlots | None = None,
    ) -> list[list[int]]:
        """New tokens of every row, up to and without its end token.

        Args:
          params: the model's parameters, or quantised ones.
          batch: prompts (`pack_rows`); rows without any token are padding and give an empty list.
          max_new_tokens: the most tokens to generate.
          sampling: greedy by default.
          seed: of the sampling.
          images: encoded images, read instead of the batch's.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        check_sampling(sampling)
        capacity = bucket(max_new_tokens)
        logits, cache, positions = self.prefill(params, batch, capacity, images)
        empty = np.asarray(batch["segment_ids"]).max(axis=1) == 0
        tokens = self._decode(
            params, logits, cache, positions, empty, jax.random.key(seed), max_new_tokens, *sampling, capacity=capacity
        )
        return [self.until_end(row) for row in np.asarray(tokens)]

    # --- the programs, one by one ------------------------------------------------------------------------------------

    def encode(self, params: Any, images: UInt8[np.ndarray, "I size size 3"]) -> list[ImageKV]:
        """Keys and values of images, one [Lv, 1, K, P, H] each; compiled for buckets of I."""
        padding = bucket(len(images), smallest=self.multiple_of) - len(images)
        padded = np.pad(images, [(0, padding), (0, 0), (0, 0), (0, 0)])
        return self._split(self._encode(params, padded))[: len(images)]

    def prefill(
        self, params: Any, batch: Batch, extra: int, images: ImageSlots | None = None
    ) -> tuple[Float[Array, "B W"], KVCache, Int[Array, " B"]]:
        """Logits after each prompt, a cache with room for `extra` more tokens a row, and the next positions."""
        if images is None and self.caches_images and batch["image_positions"].shape[1]:
            rows, slots = batch["image_positions"].shape
            pixels = batch["images"].reshape(rows * slots, *batch["images"].shape[2:])
            images = ImageSlots(
                (self._encode(params, pixels),), np.arange(rows * slots, dtype=np.int32).reshape(rows, -1)
            )
        if images is not None:
            batch = cast("Batch", {name: x for name, x in batch.items() if name != "images"})
        return self._prefill(params, batch, images, extra=extra)

    def place(self, params: Any, batch: Batch, images: ImageSlots) -> VisualKV:
        """Encoded images at the positions of the batch's slots."""
        return self._place(params, batch["image_positions"], batch["image_segment_ids"], images)

    def extend(
        self, params: Any, tokens: Any, positions: Any, segment_ids: Any, cache: KVCache
    ) -> tuple[Float[Array, "B W"], KVCache]:
        """`Saisa.extend`; the cache that is given is used up."""
        return self._extend(params, tokens, positions, segment_ids, cache=cache)

    def first(self, logits: Float[Array, "B W"], key: Any, sampling: Sampling) -> Int[Array, " B"]:
        """The first token after a prompt."""
        return self._sample(logits, key, *sampling)

    def step(
        self, params: Any, tokens: Any, positions: Any, cache: KVCache, key: Any, sampling: Sampling
    ) -> tuple[Int[Array, " B"], KVCache]:
        """Reads one token a row and chooses the next; for who wants to see every token as it comes."""
        return self._step(params, tokens, positions, key, *sampling, cache=cache)

    # --- what is compiled ---------------------------------------------------------------------------------------------

    def _apply(self, params: Any, *args: Any, method: Any) -> Any:
        return self._model.apply(variables_of(params), *args, method=method)

    def _run_encode(self, params: Any, images: Any) -> ImageKV:
        return self._apply(params, images, method=lambda model, x: model.image_kv(model.encode_images(x[:, None])))

    def _run_prefill(self, params: Any, batch: Batch, images: ImageSlots | None, extra: int) -> Any:
        image_kv = None if images is None else _gather(images)
        logits, cache = self._apply(params, batch, extra, None, image_kv, method=Saisa.prefill)
        return logits, cache, jnp.max(jnp.where(cache.segment_ids > 0, cache.positions, -1), axis=1) + 1

    def _run_place(self, params: Any, positions: Any, segment_ids: Any, images: ImageSlots) -> VisualKV:
        slots = {"image_positions": positions, "image_segment_ids": segment_ids}
        return self._apply(params, _gather(images), slots, method=Saisa.place_images)

    def _run_extend(self, params: Any, tokens: Any, positions: Any, segment_ids: Any, cache: KVCache) -> Any:
        return self._apply(params, tokens, positions, segment_ids, cache, method=Saisa.extend)

    def _run_step(
        self, params: Any, tokens: Any, positions: Any, key: Any, temperature: Any, top_p: Any, cache: KVCache
    ) -> Any:
        logits, cache = self._apply(params, tokens, positions, cache, method=Saisa.decode)
        return sample(logits, key, temperature, top_p), cache

    def decode(
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
        """Tokens [B, capacity] after a prefill with that much room; -1 where nothing was generated. For a jit.

        `done` [B]: rows that get none. `until_end` reads a row.
        """
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
            logits, cache = self._apply(params, token, positions + step - 1, cache, method=Saisa.decode)
            out, token, done, key = emit(step, out, logits, done, key)
            return step + 1, out, token, done, key, cache

        out = jnp.full((logits.shape[0], capacity), -1, jnp.int32)
        out, token, done, key = emit(0, out, logits, done, key)
        return jax.lax.while_loop(unfinished, one_more, (1, out, token, done, key, cache))[1]

    def until_end(self, row: np.ndarray) -> list[int]:
        """What a row of `decode` says, without its end token."""
        ended = np.flatnonzero(np.isin(row, (*self.eos_ids, -1)))
        return row[: ended[0] if len(ended) else None].tolist()


def _gather(images: ImageSlots) -> ImageKV:
    """[Lv, B, K, V, H]"""
    stacked = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *images.images)
    return gather_images(stacked, jnp.asarray(images.slots))
