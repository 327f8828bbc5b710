"""How much of attention's square of queries and keys is legal, and how much of it a kernel computes.

Axes: B batch, T queries, S keys, M image slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from saisa_jax.batch import Batch
from saisa_jax.config import ModelConfig, Teacher
from saisa_jax.models.attention_tpu import needed_tiles
from saisa_jax.models.mask import PackedPositions, may_attend
from saisa_jax.models.streams import visual_positions, windows


class Square(NamedTuple):
    """Queries and keys of so many layers alike."""

    layers: int
    queries: PackedPositions
    keys: PackedPositions
    window: int | None = None  # of `mask.legal`

    @property
    def pairs(self) -> int:
        """In a row."""
        return self.layers * self.queries.positions.shape[1] * self.keys.positions.shape[1]


def squares(config: ModelConfig, batch: Batch) -> Iterator[Square]:
    """The squares of a batch, of which `images` and tokens are not read."""
    text = PackedPositions(jnp.asarray(batch["positions"]), jnp.asarray(batch["segment_ids"]))
    slots = batch["image_segment_ids"].shape[1]
    roles = config.visual_roles if slots else ("none",) * config.num_layers
    together, alone, window = roles.count("queries"), roles.count("none"), config.sliding_window
    visual = visual_positions(batch, slots * config.num_visual_tokens) if slots else text
    both = _joined(visual, text)
    if together:
        yield Square(together, both, both, window)
    if together + alone < len(roles):
        yield Square(len(roles) - together - alone, text, both, window)
    if alone:
        yield Square(alone, text, text, window)
    if config.flamingo.local_text:
        asks, seen = (windows(x, visual, config.num_visual_tokens) for x in (text, visual)) if slots else (text, visual)
        yield Square(len(config.cross_layers), asks, _joined(seen, asks) if slots else asks)
    elif config.cross_layers and slots:
        yield Square(len(config.cross_layers), text, visual)


def _joined(first: PackedPositions, second: PackedPositions) -> PackedPositions:
    return PackedPositions(*(jnp.concatenate(pair, axis=1) for pair in zip(first, second, strict=True)))


def shares(
    config: ModelConfig, batch: Batch, teacher: Teacher | None = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`legal_share` and `visited_share` of a training step.

    With a teacher, those of both models by the arithmetic that their pairs take: three times as much where there is a
    backward pass.
    """
    if teacher is None:
        return legal_share(config, batch), visited_share(config, batch)
    models = (3, config), (1, teacher.model)
    sizes = [passes * sum(square.pairs for square in squares(model, batch)) for passes, model in models]

    def of_both(share: Callable[[ModelConfig, Batch], Array]) -> Array:
        return _mean([(size, share(model, batch)) for size, (_, model) in zip(sizes, models, strict=True)])

    return of_both(legal_share), of_both(visited_share)


def legal_share(config: ModelConfig, batch: Batch) -> Float[Array, ""]:
    """Pairs of a query and a key that may attend, of all pairs of the layers' squares (0..1)."""

    def share(square: Square) -> Array:
        return jnp.mean(may_attend(*square.queries, *square.keys, square.window))

    return _over_layers(config, batch, share)


def visited_share(config: ModelConfig, batch: Batch) -> Float[Array, ""]:
    """What attention's implementation computes of the layers' squares (0..1): `flash` tiles with a legal pair."""
    if config.attention_impl != "flash":
        return jnp.ones(())
    return _over_layers(
        config, batch, lambda square: jnp.mean(needed_tiles(square.queries, square.keys, square.window))
    )


def _over_layers(config: ModelConfig, batch: Batch, share: Callable[[Square], Array]) -> Float[Array, ""]:
    """The mean of a share of each square, by how many pairs its layers have."""
    return _mean([(square.pairs, share(square)) for square in squares(config, batch)])


def _mean(parts: Sequence[tuple[int, Array]]) -> Float[Array, ""]:
    """Of shares, by sizes."""
    total = sum(size for size, _ in parts)
    return sum((size / total * part for size, part in parts), start=jnp.zeros(()))
