"""Gated cross-attention (Flamingo, arXiv 2204.14198): `model.alignment=flamingo`.

The decoder sees text alone. Before layer l, for l % n == 0, stands a layer with its own W_q, W_k, W_v, W_o and MLP:

    V     = E(Z)                                          [B, V, D]   tokens of one projector, or of a resampler
    x     = x + tanh(a_l) * W_o attend(W_q RMSNorm(x), W_k V, W_v V, mask)
    x     = x + tanh(b_l) * mlp(RMSNorm'(x))

a_l and b_l are 0 at the start, where the model is exactly the decoder. Nothing is rotated; the mask is that of every
alignment, so text attends to all images of its sample that stand before it, and gets 0 where there is none.

With `flamingo.local_text` (CASA, arXiv 2512.19535) the keys are the text as well:

    q     = rope(W_q h, pos)                              h = RMSNorm(x)
    k, v  = rope(W_k [V; h], [pos_v; pos]), W_v [V; h]

within a window: the images that stand together at its start, and the text from there to the next image. Text before
the first image is a window without one.

Axes: B batch, T text, V visual tokens of a row, L layers, Lc = ceil(L / n) cross layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from saisa_jax.config import ModelConfig
from saisa_jax.models.attention import attend
from saisa_jax.models.decoder import MLP, Attention
from saisa_jax.models.kv_cache import ImageKV, KVCache
from saisa_jax.models.layers import (
    Params,
    RMSNorm,
    Rotation,
    constrain,
    dequantized,
    init_stack,
    named,
    rematerialised,
    rotate_keys,
    rotate_queries,
    rotated_layers,
    rotation,
    scan_stack,
    take_layers,
)
from saisa_jax.models.mask import KeyBlock, Mask, PackedPositions, make_mask, without
from saisa_jax.models.stack import LayerStack, Reading
from saisa_jax.models.streams import CachedVisual, LayerGroup, Stream, StreamedVisual, windows


class CrossBlock(nn.Module):
    """One cross layer."""

    config: ModelConfig

    def setup(self) -> None:
        c, param_dtype = self.config, jnp.dtype(self.config.param_dtype)
        self.input_norm = RMSNorm(c.norm_eps, param_dtype)
        self.attn = Attention(c)
        self.attn_gate = self.param("attn_gate", named(nn.initializers.zeros), (), param_dtype)
        self.post_attn_norm = RMSNorm(c.norm_eps, param_dtype)
        self.mlp = MLP(c)
        self.mlp_gate = self.param("mlp_gate", named(nn.initializers.zeros), (), param_dtype)

    def visual_kv(self, tokens: Float[Array, "B V D"]) -> tuple[Float[Array, "B K V H"], Float[Array, "B K V H"]]:
        """Keys (not rotated) and values of visual tokens."""
        return self.attn.keys_values(tokens)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        others: Sequence[KeyBlock],
        own: tuple[Rotation, Mask] | None = None,
        impl: str = "xla",
    ) -> tuple[Float[Array, "B T D"], Any, Any]:
        """The text through one cross layer.

        Args:
          x: its residual stream.
          others: the image, and the window's earlier text.
          own: with `local_text` the rotation of the text, and the mask of its attention to itself.
          impl: of attention (`attention.py`).

        Returns:
          The residual stream, the text's own keys (rotated) and values (None without `own`), and the weights over
          [others..., own], float32 [B, N, T, S] (None unless `impl` is xla, and where there is nothing to attend to).
        """
        h, kv, weights, blocks = self.input_norm(x), None, None, list(others)
        q = self.attn.queries(h)
        if own is not None:
            rope, mask = own
            k, v = self.attn.keys_values(h)
            kv = rotate_keys(k, rope), v
            q = rotate_queries(q, rope)
            blocks.append(KeyBlock(*kv, mask))
        if blocks:
            out, weights = attend(q, blocks, impl)
            x = x + self._gate(self.attn_gate, x) * self.attn.o_proj(out)
        x = x + self._gate(self.mlp_gate, x) * self.mlp(self.post_attn_norm(x))
        return constrain(x, "activation_batch", "activation_length", "activation_embed"), kv, weights

    @staticmethod
    def _gate(value: Any, x: Any) -> Any:
        return jnp.tanh(value.astype(jnp.float32)).astype(x.dtype)


def init_cross_layers(config: ModelConfig) -> Callable[[Any], Params]:
    """An initializer of all cross layers, stacked."""
    where = PackedPositions(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
    kv = jnp.zeros((1, config.num_kv_heads, 1, config.head_dim))
    block = CrossBlock(config, parent=None)

    def initialise(module: CrossBlock, x: Any) -> None:
        module.visual_kv(x)
        module(x, [KeyBlock(kv, kv, make_mask(where, where))])

    return init_stack(block, len(config.cross_layers), jnp.zeros((1, 1, config.embed_dim)), method=initialise)


class CrossedStack(LayerStack):
    """The decoder's layers with a cross layer before every n-th: a scan over groups, in it one over a group's layers.

    Args:
      config: the model.
      block: what computes a layer of the decoder.
      params: of all of these, stacked.
      cross_params: of all cross layers, stacked.
    """

    def __init__(self, config: ModelConfig, block: nn.Module, params: Params, cross_params: Params) -> None:
        super().__init__(config, block, params)
        self.cross, self.cross_params = CrossBlock(config, parent=None), cross_params

    def visual_kv(self, params: Params, projector: Params, x: Any, role: str) -> tuple[Any, tuple[Any, Any]]:
        """One cross layer's keys (not rotated) and values of the visual tokens, which are the same for all."""
        return x, self._apply_cross(params, "visual_kv", x)

    def image_kv(self, x: Any) -> ImageKV:
        """Keys, not rotated, and values of images for every cross layer."""
        _, kv = self._scan(lambda x, params: self.visual_kv(params, {}, x, "keys"), x, self.cross_params)
        return ImageKV(*kv)

    def run(
        self,
        stream: Stream,
        visual: StreamedVisual | CachedVisual | None,
        past: KVCache | None = None,
        asking: PackedPositions | None = None,
        unseen: Bool[Array, " L"] | None = None,
        capture: tuple[str, ...] = (),
        impl: str = "xla",
    ) -> tuple[Any, dict[str, Any]]:
        """The text through all layers; as `LayerStack.run`.

        Of a layer behind a cross layer, `attention` has the cross layer's in the columns of visual tokens: they add to
        1 by themselves (with `local_text` less). Further entries of `kv` are the text's in cross layers.
        """
        c, count = self.config, len(self.config.cross_layers)
        of_text, past_mask = self._places(stream, past, asking)
        layer = functools.partial(self._layer, Reading(None, 0, past_mask, capture, impl), "none", *of_text)
        crossing = self._crossing(stream, visual, past, capture, impl)
        cross = rematerialised(functools.partial(self._cross, crossing), c.remat_policy, c.scan_layers)

        def group(x: Any, inputs: Any) -> tuple[Any, Any]:
            x, crossed = cross(x, inputs[0])
            (x, _), out = self._scan(layer, (x, None), inputs[1])
            return x, (crossed, out)

        past_kv = None if past is None else (past.k, past.v)
        of_image = None if visual is None else visual.inputs(LayerGroup(0, count, "keys", 0))
        before = take_layers(past_kv, c.num_layers, c.num_cached_layers) if c.flamingo.local_text else None
        hides = None if unseen is None else unseen[jnp.asarray(c.cross_layers)]
        of_cross = self.cross_params, of_image, before, hides
        rotates = rotated_layers(c, range(c.num_layers))
        of_layers = self.params, None, take_layers(past_kv, 0, c.num_layers), None, rotates

        x, outs, whole = stream.x, [], c.num_layers // c.flamingo.every
        for first, last in ((0, whole), (whole, count)):  # groups of n layers, and one of what is left
            start, stop = (min(number * c.flamingo.every, c.num_layers) for number in (first, last))
            if first < last:
                inside = _cut(take_layers(of_layers, start, stop), last - first)
                inputs = take_layers(of_cross, first, last), inside
                x, (crossed, out) = scan_stack(group, x, inputs, remat_policy="none", scan=c.scan_layers)
                outs.append((crossed, _uncut(out)))
        crossed, captured = jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)
        return x, self._captured(stream, crossing.tokens, captured, crossed)

    def _crossing(
        self, stream: Stream, visual: Any, past: KVCache | None, capture: tuple[str, ...], impl: str
    ) -> _Crossing:
        c, images = self.config, PackedPositions(*(jnp.zeros((len(stream.x), 0), jnp.int32),) * 2)
        images, own, past_mask = images if visual is None else visual.places, None, None
        if c.flamingo.local_text:
            place = functools.partial(windows, images=images, per_image=c.num_visual_tokens)
            own = rotation(stream.positions, c), make_mask(place(stream), place(stream))
            past_mask = None if past is None else make_mask(place(stream), place(past))
        return _Crossing(visual, images.positions.shape[1], own, past_mask, capture, impl)

    def _cross(self, crossing: _Crossing, x: Any, inputs: Any) -> tuple[Any, dict[str, Any]]:
        """A cross layer: the text, and what is captured of it."""
        (params, of_image, past_kv, hides), others = inputs, []
        if crossing.source is not None:
            _, image = crossing.source.read(params, None, of_image, "keys")
            others.append(image if hides is None else image._replace(mask=without(image.mask, hides)))
        if crossing.past_mask is not None:
            others.append(KeyBlock(past_kv[0], past_kv[1], crossing.past_mask))
        x, kv, attention = self._apply_cross(params, "__call__", x, others, crossing.own, crossing.impl)
        available = {"kv": kv}
        if crossing.tokens and {"attention", "image_attention"} & set(crossing.capture):
            of_image = attention[..., : crossing.tokens]
            available |= {"attention": of_image, "image_attention": jnp.mean(jnp.sum(of_image, axis=-1), axis=1)}
        return x, {name: available[name] for name in crossing.capture if available.get(name) is not None}

    def _captured(self, stream: Stream, tokens: int, captured: dict[str, Any], crossed: dict[str, Any]) -> Any:
        """What is captured of the decoder's layers, with what is of the cross layers before them."""
        out, every = dict(captured), self.config.flamingo.every
        if "hidden" in out:
            out["hidden"] = jnp.concatenate([stream.x[None], out["hidden"][0]]), None
        if "kv" in crossed:
            out["kv"] = tuple(jnp.concatenate(pair) for pair in zip(out["kv"], crossed["kv"], strict=True))
        if "attention" in out:
            out["attention"] = jnp.pad(out["attention"], [(0, 0)] * 4 + [(tokens, 0)])
        if "attention" in crossed:
            out["attention"] = out["attention"].at[::every, ..., :tokens].set(crossed["attention"])
        if "image_attention" in crossed:
            out["image_attention"] = out["image_attention"].at[::every].set(crossed["image_attention"])
        return out

    def _apply_cross(self, params: Params, method: str, *args: Any) -> Any:
        return self.cross.apply({"params": dequantized(params, jnp.dtype(self.config.dtype))}, *args, method=method)


class _Crossing(NamedTuple):
    """What is the same for all cross layers."""

    source: StreamedVisual | CachedVisual | None  # of the image's keys and values
    tokens: int  # V
    own: tuple[Rotation, Mask] | None  # of the text's attention to itself
    past_mask: Mask | None
    capture: tuple[str, ...]
    impl: str


def _cut(tree: Any, groups: int) -> Any:
    """Stacked layers as `groups` stacks of a group's."""
    return jax.tree.map(lambda leaf: leaf.reshape(groups, -1, *leaf.shape[1:]), tree)


def _uncut(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)
