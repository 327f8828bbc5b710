"""Generation over a preallocated key/value cache: two programs, one that encodes images and one that answers.

Rows of different lengths share a batch: positions and segments, not the side of the padding, say who reads what. A
batch is compiled once for its bucket (rows, text length, image slots, new tokens), so a second batch of a like size
compiles nothing. Whatever touches an array is inside a jitted function: an operation outside is a program of its own,
which every process compiles anew.
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
from saisa_jax.config import ConfigError, ModelConfig
from saisa_jax.inference.quantize import variables_of
from saisa_jax.models.kv_cache import ImageKV, KVCache, VisualKV, gather_images, grow, next_positions, rewind
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

    Under all alignments but LLaVA generation is always two programs: `encode` the images, then prefill the text that
    reads them and decode; images that were encoded before skip the first. Under LLaVA images are encoded within the
    second. A conversation, which wants every token as it comes, has `encode`, `start` or `extend`, and `step`.

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
        self._answer = jax.jit(self._run_answer, static_argnames="capacity")
        self._prefill = jax.jit(self._run_prefill, static_argnames="extra")
        self._start = jax.jit(self._run_start, static_argnames="extra")
        self._place = jax.jit(self._run_place)
        self._extend = jax.jit(self._run_extend, donate_argnames="cache")
        self._extend_in_more_room = jax.jit(self._run_extend, static_argnames="room")  # no buffer fits another size
        self._step = jax.jit(self._run_step, donate_argnames="cache")

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
        empty = np.asarray(batch["segment_ids"]).max(axis=1) == 0
        batch, images = self._with_encoded(params, batch, images)
        tokens = self._answer(
            params,
            batch,
            images,
            empty,
            np.int32(max_new_tokens),
            *_chosen_by(sampling, seed),
            capacity=bucket(max_new_tokens),
        )
        return self.until_end(np.asarray(tokens))

    # --- the programs, one by one ------------------------------------------------------------------------------------

    def encode(self, params: Any, images: Any) -> list[ImageKV]:
        """Keys and values of images, one [Lv, 1, K, P, H] each; compiled for buckets of I.

        Args:
          params: the model's parameters, or quantised ones.
          images: uint8 [I, size, size, 3], or features of them [I, P, C].
        """
        padding = bucket(len(images), smallest=self.multiple_of) - len(images)
        padded = np.pad(images, [(0, padding), *[(0, 0)] * (images.ndim - 1)]) if padding else images
        return self._encode(params, padded)[: len(images)]

    def prefill(
        self, params: Any, batch: Batch, extra: int, images: ImageSlots | None = None
    ) -> tuple[Float[Array, "B W"], KVCache, Int[Array, " B"]]:
        """Logits after each prompt, a cache with room for `extra` more tokens a row, and the next positions."""
        return self._prefill(params, *self._with_encoded(params, batch, images), extra=extra)

    def start(
        self,
        params: Any,
        batch: Batch,
        extra: int,
        images: ImageSlots | None = None,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> tuple[Int[Array, " B"], KVCache]:
        """The first token after prompts that are padded on the right, and a cache that holds the prompts alone.

        `extra` columns are allocated beyond those of the batch; those of its padding are free as well.
        """
        used = int(np.sum(np.asarray(batch["segment_ids"]) > 0, axis=1).max())
        batch, images = self._with_encoded(params, batch, images)
        return self._start(params, batch, images, np.int32(used), *_chosen_by(sampling, seed), extra=extra)

    def place(self, params: Any, batch: Batch, images: ImageSlots) -> VisualKV:
        """Encoded images at the positions of the batch's slots."""
        return self._place(params, batch["image_positions"], batch["image_segment_ids"], images)

    def extend(
        self,
        params: Any,
        tokens: Any,
        positions: Any,
        segment_ids: Any,
        cache: KVCache,
        kept: int,
        room: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> tuple[Int[Array, " B"], KVCache]:
        """The first token after `kept` columns of the cache and T more tokens a row (`Saisa.extend`), and their cache.

        The cache that is given is used up; the one that comes back has `room` columns, or as many as it had.
        """
        args = params, tokens, positions, segment_ids, np.int32(kept), *_chosen_by(sampling, seed)
        if room <= cache.k.shape[3]:
            return self._extend(*args, cache=cache)
        return self._extend_in_more_room(*args, cache=cache, room=room)

    def step(
        self,
        params: Any,
        tokens: Any,
        positions: Any,
        cache: KVCache,
        number: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> tuple[Int[Array, " B"], KVCache]:
        """Reads one token a row and chooses the next, which is the one of that `number` (from 0) in its answer."""
        return self._step(params, tokens, positions, np.int32(number), *_chosen_by(sampling, seed), cache=cache)

    def _with_encoded(self, params: Any, batch: Batch, images: ImageSlots | None) -> tuple[Batch, ImageSlots | None]:
        """The batch without pixels and its encoded images, where there are such; the pixels of LLaVA stay."""
        if images is None and self.caches_images and batch["image_positions"].shape[1]:
            rows, slots = batch["image_positions"].shape
            pixels = batch["images"].reshape(rows * slots, *batch["images"].shape[2:])
            parts = tuple(self._encode(params, pixels))
            images = ImageSlots(parts, np.arange(rows * slots, dtype=np.int32).reshape(rows, -1))
        if images is not None:
            batch = cast("Batch", {name: x for name, x in batch.items() if name != "images"})
        return batch, images

    # --- what is compiled ---------------------------------------------------------------------------------------------

    def apply(self, params: Any, *args: Any, method: Any) -> Any:
        """A method of the model. For a jit, as what follows."""
        return self._model.apply(variables_of(params), *args, method=method)

    def image_kv(self, params: Any, images: Any) -> ImageKV:
        """Keys and values of images [I, size, size, 3], or of features [I, P, C]."""
        return self.apply(params, images, method=lambda model, x: model.image_kv(model.encode_images(x[:, None])))

    def _run_encode(self, params: Any, images: Any) -> list[ImageKV]:
        kv = self.image_kv(params, images)
        return [ImageKV(kv.k[:, i : i + 1], kv.v[:, i : i + 1]) for i in range(kv.k.shape[1])]

    def _run_prefill(self, params: Any, batch: Batch, images: ImageSlots | None, extra: int) -> Any:
        image_kv = None if images is None else _gather(images)
        logits, cache = self.apply(params, batch, extra, None, image_kv, method=Saisa.prefill)
        return logits, cache, next_positions(cache)

    def _run_answer(
        self,
        params: Any,
        batch: Batch,
        images: ImageSlots | None,
        empty: Any,
        limit: Any,
        seed: Any,
        temperature: Any,
        top_p: Any,
        capacity: int,
    ) -> Any:
        logits, cache, positions = self._run_prefill(params, batch, images, capacity)
        key = jax.random.key(seed)
        return self.decode(params, logits, cache, positions, empty, key, limit, temperature, top_p, capacity)

    def _run_start(
        self,
        params: Any,
        batch: Batch,
        images: ImageSlots | None,
        used: Any,
        seed: Any,
        temperature: Any,
        top_p: Any,
        extra: int,
    ) -> tuple[Any, KVCache]:
        logits, cache, _ = self._run_prefill(params, batch, images, extra)
        visual = cache.k.shape[3] - batch["tokens"].shape[1] - extra  # columns of LLaVA's visual tokens
        return _choose(logits, seed, 0, temperature, top_p), rewind(cache, visual + used)

    def _run_place(self, params: Any, positions: Any, segment_ids: Any, images: ImageSlots) -> VisualKV:
        slots = {"image_positions": positions, "image_segment_ids": segment_ids}
        return self.apply(params, _gather(images), slots, method=Saisa.place_images)

    def _run_extend(
        self,
        params: Any,
        tokens: Any,
        positions: Any,
        segment_ids: Any,
        kept: Any,
        seed: Any,
        temperature: Any,
        top_p: Any,
        cache: KVCache,
        room: int = 0,
    ) -> tuple[Any, KVCache]:
        cache = rewind(grow(cache, room - cache.k.shape[3]) if room else cache, kept)
        logits, cache = self.apply(params, tokens, positions, segment_ids, cache, method=Saisa.extend)
        return _choose(logits, seed, 0, temperature, top_p), cache

    def _run_step(
        self,
        params: Any,
        tokens: Any,
        positions: Any,
        number: Any,
        seed: Any,
        temperature: Any,
        top_p: Any,
        cache: KVCache,
    ) -> tuple[Any, KVCache]:
        logits, cache = self.apply(params, tokens, positions, cache, method=Saisa.decode)
        return _choose(logits, seed, number, temperature, top_p), cache

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

        `done` [B]: rows that get none. `until_end` reads them.
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
            logits, cache = self.apply(params, token, positions + step - 1, cache, method=Saisa.decode)
            out, token, done, key = emit(step, out, logits, done, key)
            return step + 1, out, token, done, key, cache

        out = jnp.full((logits.shape[0], capacity), -1, jnp.int32)
        out, token, done, key = emit(0, out, logits, done, key)
        return jax.lax.while_loop(unfinished, one_more, (1, out, token, done, key, cache))[1]

    def until_end(self, tokens: Int[np.ndarray, "B T"]) -> list[list[int]]:
        """What each row of `decode` says, without its end token."""
        ended = np.isin(tokens, (*self.eos_ids, -1))
        lengths = np.where(ended.any(axis=1), ended.argmax(axis=1), tokens.shape[1])
        return [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]


def _chosen_by(sampling: Sampling, seed: int) -> tuple[np.uint32, np.float32, np.float32]:
    """Seed, temperature and top_p, of one type whatever the caller's: another one would be another program."""
    return np.uint32(seed % 2**32), np.float32(sampling.temperature), np.float32(sampling.top_p)


def _choose(logits: Any, seed: Any, number: Any, temperature: Any, top_p: Any) -> Any:
    """Token `number` of an answer that is sampled with `seed`."""
    return sample(logits, jax.random.fold_in(jax.random.key(seed), number), temperature, top_p)


def _gather(images: ImageSlots) -> ImageKV:
    """[Lv, B, K, V, H]"""
    stacked = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *images.images)
    return gather_images(stacked, jnp.asarray(images.slots))
