"""The two streams of tokens, and where a layer's keys and values of the image come from.

The decoder runs as a few scans, one for each group of layers of one kind (`layer_groups`). In each layer, the query
stream gets the image's keys and values from a visual source: `StreamedVisual` makes them as the layers run (training,
scoring), `CachedVisual` has them already (generation).

Axes: B batch, V visual tokens, S tokens of a stream, D embed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp

from saisa_jax.batch import Batch
from saisa_jax.config import ModelConfig
from saisa_jax.models.kv_cache import VisualKV
from saisa_jax.models.layers import Params, rotate_keys, rotation, take_layers
from saisa_jax.models.mask import KeyBlock, Mask, PackedPositions, make_mask


class Stream(NamedTuple):
    """Tokens of each row with their places: x [B, S, D], positions and segment_ids [B, S]."""

    x: Any
    positions: Any
    segment_ids: Any


def joined(first: Stream, second: Stream) -> Stream:
    """Two streams as one."""
    return Stream(*(jnp.concatenate(pair, axis=1) for pair in zip(first, second, strict=True)))


class LayerGroup(NamedTuple):
    """Layers start..stop in which visual tokens are the same (`ModelConfig.visual_roles`)."""

    start: int
    stop: int
    role: str
    first_projector: int

    @property
    def reads_keys(self) -> bool:
        """Whether the image's keys and values stand beside the queries' own."""
        return self.role in ("keys", "mlp")

    @property
    def projectors(self) -> tuple[int, int]:
        """Where the projectors of the group, and its keys and values of the image, start and stop in their stacks."""
        return self.first_projector, self.first_projector + self.stop - self.start


def layer_groups(config: ModelConfig, has_image: bool = True) -> Iterator[LayerGroup]:
    """Maximal groups of layers of one kind: a single group if visual tokens are the same in all layers."""
    start = projector = 0
    roles = config.visual_roles if has_image else ("none",) * config.num_layers
    for role, layers in itertools.groupby(roles):
        stop = start + len(list(layers))
        yield LayerGroup(start, stop, role, projector)
        projector += 0 if role == "none" else stop - start
        start = stop


def visual_positions(batch: Batch, visual_tokens: int) -> PackedPositions:
    """Positions and segments [B, V] of a row's visual tokens, from those of its image slots."""
    starts, segments = jnp.asarray(batch["image_positions"]), jnp.asarray(batch["image_segment_ids"])
    per_image = visual_tokens // starts.shape[1]
    positions = starts[:, :, None] + jnp.arange(per_image, dtype=jnp.int32)
    return PackedPositions(positions.reshape(starts.shape[0], -1), jnp.repeat(segments, per_image, axis=1))


def windows(tokens: Any, images: Any, per_image: int) -> PackedPositions:
    """Places of tokens [B, S] whose segments are windows of Flamingo's local text (`cross.py`).

    A window begins with images, of which each stands right behind the one before, and holds the text up to the next
    image; what stands before the first image of a sample is a window as well.

    Args:
      tokens: anything with `positions` and `segment_ids` [B, S].
      images: likewise, of visual tokens [B, V], slot by slot.
      per_image: P.
    """
    starts, samples = images.positions[:, ::per_image], images.segment_ids[:, ::per_image]  # [B, M]
    behind = starts[:, :, None] == starts[:, None] + per_image
    begins = (samples > 0) & ~(behind & (samples[:, :, None] == samples[:, None])).any(axis=2)
    segments, positions = tokens.segment_ids[:, :, None], tokens.positions[:, :, None]
    begun = jnp.sum(begins[:, None] & (segments == samples[:, None]) & (positions >= starts[:, None]), axis=2)
    numbered = tokens.segment_ids * (starts.shape[1] + 1) + begun
    return PackedPositions(tokens.positions, jnp.where(tokens.segment_ids > 0, numbered, 0))


def image_mask(queries: Any, visual: Any, config: ModelConfig) -> Mask:
    """Which visual tokens a stream attends to; under Flamingo, in cross layers."""
    if config.alignment != "flamingo":
        return make_mask(queries, visual, config.sliding_window)
    if config.flamingo.local_text:
        queries, visual = (windows(places, visual, config.num_visual_tokens) for places in (queries, visual))
    return make_mask(queries, visual)


class StreamedVisual:
    """Keys and values of the image, made as the layers run: V_l is projected anew (SAISA), or carried on (NAAViT).

    Args:
      visual: the visual stream: what the layers' own projectors read, or tokens where one before them serves all.
      queries: the stream that attends to it.
      config: the model.
      projectors_of: the projectors of a group of layers, as parameters of its blocks.
      visual_kv: (a layer's parameters, its projector, the visual stream, its role) -> (the stream after the layer,
        (k, v)).
    """

    def __init__(
        self,
        visual: Stream,
        queries: Stream,
        config: ModelConfig,
        projectors_of: Callable[[LayerGroup], Params],
        visual_kv: Callable[[Params, Params, Any, str], tuple[Any, tuple[Any, Any]]],
    ) -> None:
        self.inputs = projectors_of  # what each layer of a group needs
        self.places = PackedPositions(visual.positions, visual.segment_ids)
        # What no layer changes stays out of the scan's carry, of which the backward pass keeps a copy for every layer.
        self.state = None if config.alignment in ("saisa", "flamingo") else visual.x
        self._features = visual.x
        self._visual_kv = visual_kv
        self._rope = rotation(visual.positions, config) if config.rotates_images else None
        self._mask = image_mask(queries, visual, config)

    def read(
        self, params: Params, state: Any, projector: Params, role: str, rotates: Any = None
    ) -> tuple[Any, KeyBlock]:
        """One layer: the state for the next one, and its keys (rotated, if the layer rotates) and values."""
        after, (k, v) = self._visual_kv(params, projector, self._features if state is None else state, role)
        k = k if self._rope is None else rotate_keys(k, self._rope.where(rotates))
        return None if state is None else after, KeyBlock(k, v, self._mask)


class CachedVisual:
    """Keys and values of the image that were made before.

    Args:
      visual: of all layers that attend to the image, rotated to the positions of their rows.
      queries: the stream that attends to them.
      config: the model.
    """

    state = None

    def __init__(self, visual: VisualKV, queries: Stream, config: ModelConfig) -> None:
        self.places = PackedPositions(visual.positions, visual.segment_ids)
        self._kv = visual.k, visual.v
        self._mask = image_mask(queries, visual, config)

    def inputs(self, group: LayerGroup) -> tuple[Any, Any]:
        """What each layer of a group needs: its keys and values."""
        return take_layers(self._kv, *group.projectors)

    def read(
        self, params: Params, state: None, kv: tuple[Any, Any], role: str, rotates: Any = None
    ) -> tuple[None, KeyBlock]:
        """One layer: nothing for the next one, and its keys and values."""
        return None, KeyBlock(kv[0], kv[1], self._mask)
