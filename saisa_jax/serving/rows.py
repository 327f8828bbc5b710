"""Rows of one batch that are read, decoded and cleared independently: what continuous batching needs of the devices.

A row has columns of its own in the text cache, from the first, and slots of its own for pictures. Four programs serve
every question: `place` puts an encoded picture into a slot, `read` a piece of a prompt into a row, `step` chooses one
more token for all rows that decode, `clear` empties a row. A row reads its own columns alone and draws with its own
seed, so that its answer does not depend on its neighbours.

Columns and slots are those of a `Level`: what every row holds is read in every step, so the buffers are as small as the
questions at hand allow, and there are few levels, each compiled before the first question.

Axes: B rows, S columns of a row's text, M slots of pictures, P visual tokens of a picture.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saisa_jax.config import ConfigError
from saisa_jax.inference.generate import sample
from saisa_jax.inference.model import VisionLanguageModel
from saisa_jax.inference.quantize import variables_of
from saisa_jax.models.kv_cache import ImageKV, KVCache, VisualKV
from saisa_jax.models.saisa import Saisa

PIECES = (32, 128)  # text tokens that are read at once: few, so that no row waits longer for its next token than that


class Level(NamedTuple):
    """A size of the buffers of every row."""

    columns: int
    images: int


class Choices(NamedTuple):
    """How each row chooses a token: [B] each. `number` counts the tokens of its answer from 0."""

    seed: np.ndarray
    number: np.ndarray
    temperature: np.ndarray
    top_p: np.ndarray


def make_levels(max_length: int, max_images: int, piece: int) -> list[Level]:
    """From the smallest to that which holds every prompt of the model; columns are multiples of a piece."""
    top = -(-max_length // piece) * piece
    columns, images, levels = 2 * piece, 1, []
    while columns < top:
        levels.append(Level(columns, min(images, max_images)))
        columns, images = 4 * columns, 2 * images
    return [*levels, Level(top, max_images)]


class Rows:
    """The batch on its devices.

    Args:
      model: of any alignment but llava, on devices that do not split rows.
      count: B.
      max_images: of a question, each of as many views as `model.vision` makes of one.
      pieces: sizes of what `read` takes, the smaller first.

    Raises:
      ConfigError: another model, or no rows.
    """

    def __init__(
        self, model: VisionLanguageModel, count: int, max_images: int, pieces: tuple[int, ...] = PIECES
    ) -> None:
        config = model.model_config
        if not model.generator.caches_images:
            raise ConfigError(
                f"model.alignment={config.alignment} is not served: its visual tokens depend on the text before them, "
                "so that no picture is encoded ahead; the other alignments are, and chat and eval.py answer with all"
            )
        if model.row_ways != 1:
            raise ConfigError("a server splits no rows: load the model on a mesh with data=1 and fsdp=1, or without")
        if count < 1:
            raise ConfigError(f"--rows={count} must be at least 1")
        sees = "vision" in variables_of(model.params)["params"] and not model.config.data.blind
        fitting = (config.max_length - 1) // config.num_visual_tokens
        self.max_images = max(0, min(max_images * config.vision.max_views, fitting)) if sees else 0
        self.count, self.pieces = count, pieces
        self.levels = make_levels(config.max_length, self.max_images, pieces[-1])
        self._model, self._config = model, config
        self._place = jax.jit(self._run_place, donate_argnums=1)
        self._read = jax.jit(self._run_read, donate_argnums=1)
        self._step = jax.jit(self._run_step, donate_argnums=1)
        self._clear = jax.jit(self._run_clear, donate_argnums=0)
        self._resize = jax.jit(self._run_resize, static_argnums=1)
        self.reset()

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers at their present level."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._state))

    def level_of(self, columns: int, images: int) -> Level:
        """The smallest level with so many columns and pictures."""
        return next(level for level in self.levels if level.columns >= columns and level.images >= images)

    def columns_of(self, tokens: int, new: int) -> int:
        """Columns that a prompt and its answer take; the last piece of the prompt is written with its padding."""
        *_, (start, size) = self.pieces_of(tokens)
        return max(start + size, tokens + new)

    def pieces_of(self, tokens: int) -> list[tuple[int, int]]:
        """(start, size) of the pieces in which a prompt is read."""
        out, start = [], 0
        while start < tokens:
            size = next((size for size in self.pieces if tokens - start <= size), self.pieces[-1])
            out.append((start, size))
            start += size
        return out

    # --- what changes the rows ----------------------------------------------------------------------------------------

    def reset(self) -> None:
        """All rows empty, at the lowest level."""
        self.level = self.levels[0]
        self._state = _empty(self._model, self.count, self.level)

    def fit(self, level: Level) -> None:
        """Buffers of this level, which holds what the rows hold."""
        if level != self.level:
            self._state = self._resize(self._state, level)
            self.level = level

    def place(self, row: int, slot: int, image: ImageKV, position: int) -> None:
        """Puts an encoded picture, whose first visual token has that position, into a slot of a row."""
        self._state = self._place(self._model.params, self._state, *map(np.int32, (row, slot, position)), image)

    def read(self, row: int, tokens: Any, positions: Any, choice: Choices) -> jax.Array:
        """Reads a piece of a row's prompt; the token [1] that would follow it."""
        size = next(size for size in self.pieces if len(tokens) <= size)
        pad = lambda x: np.pad(np.asarray(x, np.int32), (0, size - len(x)))[None]  # noqa: E731
        text = pad(tokens), pad(positions), pad(np.ones(len(tokens)))
        token, self._state = self._read(self._model.params, self._state, np.int32(row), *text, choice)
        return token

    def step(self, tokens: np.ndarray, positions: np.ndarray, active: np.ndarray, choices: Choices) -> jax.Array:
        """Reads a token in each active row, and chooses the next: [B]."""
        token, self._state = self._step(self._model.params, self._state, tokens, positions, active, choices)
        return token

    def clear(self, row: int) -> None:
        """Empties a row."""
        self._state = self._clear(self._state, np.int32(row))

    def warm_up(self, level: Level, image: ImageKV | None) -> None:
        """Compiles, by running them on an empty row, the programs of a level, and the ways to and from the others."""
        one, every = (
            Choices(np.zeros(n, np.uint32), np.zeros(n, np.int32), np.zeros(n, np.float32), np.ones(n, np.float32))
            for n in (1, self.count)
        )
        for other in self.levels:
            self.fit(other)
            self.fit(level)
        if image is not None:
            self.place(0, 0, image, 0)
        for size in self.pieces:
            self.read(0, np.zeros(size, np.int32), np.arange(size), one)
            self.clear(0)
        none = np.zeros(self.count, np.int32)
        jax.block_until_ready(self.step(none, none, none, every))

    # --- what is compiled ---------------------------------------------------------------------------------------------

    def _run_place(self, params: Any, state: KVCache, row: Any, slot: Any, position: Any, image: ImageKV) -> KVCache:
        where = {"image_positions": position[None, None], "image_segment_ids": jnp.ones((1, 1), jnp.int32)}
        new = self._model.generator.apply(params, image, where, method=Saisa.place_images)
        return state._replace(visual=_written(state.visual, new, row, slot * image.k.shape[3]))

    def _run_read(
        self, params: Any, state: KVCache, row: Any, tokens: Any, positions: Any, segment_ids: Any, choice: Choices
    ) -> tuple[Any, KVCache]:
        one = _of_row(state, row)
        logits, one = self._model.generator.apply(params, tokens, positions, segment_ids, one, method=Saisa.extend)
        text = _written(state._replace(visual=None, length=None), one._replace(visual=None, length=None), row, 0)
        length = state.length.at[row].set(one.length)
        return choose(logits, choice), text._replace(visual=state.visual, length=length)

    def _run_step(
        self, params: Any, state: KVCache, tokens: Any, positions: Any, active: Any, choices: Choices
    ) -> tuple[Any, KVCache]:
        # A row that does not decode writes a column of segment 0, which is not counted.
        column = tokens[:, None], positions[:, None], active[:, None]
        logits, state = self._model.generator.apply(params, *column, state, method=Saisa.extend)
        return choose(logits, choices), state

    @staticmethod
    def _run_clear(state: KVCache, row: Any) -> KVCache:
        visual = state.visual
        if visual is not None:
            visual = visual._replace(segment_ids=visual.segment_ids.at[row].set(0))
        return state._replace(
            segment_ids=state.segment_ids.at[row].set(0), length=state.length.at[row].set(0), visual=visual
        )

    def _run_resize(self, state: KVCache, level: Level) -> KVCache:
        def sized(tree: Any, size: int) -> Any:
            return type(tree)(
                *(x if x is None or x.ndim == 1 else _with_columns(x, size, 1 if x.ndim == 2 else 3) for x in tree)
            )

        visual = state.visual
        if visual is not None:
            visual = sized(visual, level.images * self._config.num_visual_tokens)
        return sized(state._replace(visual=None), level.columns)._replace(visual=visual)


def choose(logits: Any, choices: Choices) -> Any:
    """A token for each row, drawn as a conversation with its seed would draw it. For a jit."""

    def draw(row: Any, choice: Choices) -> Any:
        key = jax.random.fold_in(jax.random.key(choice.seed), choice.number)
        return sample(row[None], key, choice.temperature, choice.top_p)[0]

    best = lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32)  # noqa: E731  (no row sorts its logits for it)
    return jax.lax.cond(jnp.any(choices.temperature > 0), lambda: jax.vmap(draw)(logits, choices), best)


def _empty(model: VisionLanguageModel, rows: int, level: Level) -> KVCache:
    c = model.model_config
    zeros = functools.partial(jnp.zeros, dtype=jnp.dtype(c.dtype))
    places = functools.partial(jnp.zeros, dtype=jnp.int32)
    text, visual = (c.num_cached_layers, rows, c.num_kv_heads, level.columns, c.head_dim), None
    if level.images:
        tokens = level.images * c.num_visual_tokens
        of_images = (len(c.visible_layers), rows, c.num_kv_heads, tokens, c.head_dim)
        visual = VisualKV(zeros(of_images), zeros(of_images), places((rows, tokens)), places((rows, tokens)))
    columns = places((rows, level.columns)), places((rows, level.columns))
    return KVCache(zeros(text), zeros(text), *columns, places(rows), visual)


def _of_row(state: KVCache, row: Any) -> KVCache:
    """One row as a cache of its own."""
    take = jax.lax.dynamic_slice_in_dim
    one = jax.tree.map(lambda x: take(x, row, 1, axis=1 if x.ndim == 5 else 0), state)
    return one._replace(length=state.length[row])


def _written(old: Any, new: Any, row: Any, column: Any) -> Any:
    """Buffers with one row's columns, from `column` on, replaced."""

    def put(old: Any, new: Any) -> Any:
        start = (0, row, 0, column, 0) if old.ndim == 5 else (row, column)
        return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), start)

    return jax.tree.map(put, old, new)


def _with_columns(x: Any, size: int, axis: int) -> Any:
    if size <= x.shape[axis]:
        return jax.lax.slice_in_dim(x, 0, size, axis=axis)
    return jnp.pad(x, [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])
