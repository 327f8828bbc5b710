"""The decoder's layers: stacked parameters, and the few scans in which the text runs through them.

Blocks are pure functions of their parameters, so that one stack serves training's scan over a group of layers alike
(`streams.layer_groups`) and the image cache, which scans the visual part of the same layers alone.

Axes: B batch, T text, V visual tokens of a row, L layers, Lv layers that see the image.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from saisa_jax.config import ModelConfig
from saisa_jax.models.attention import attention_of_text
from saisa_jax.models.kv_cache import ImageKV, KVCache
from saisa_jax.models.layers import (
    Params,
    constrain,
    dequantized,
    platform,
    rotated_layers,
    rotation,
    scan_stack,
    take_layers,
)
from saisa_jax.models.lora import in_dtype
from saisa_jax.models.mask import KeyBlock, Mask, PackedPositions, make_mask, without
from saisa_jax.models.streams import CachedVisual, LayerGroup, Stream, StreamedVisual, layer_groups

STACKED = ("hidden", "attention", "image_attention")  # captures with one entry a layer


class LayerStack:
    """All layers of the decoder.

    Args:
      config: the model.
      block: what computes a layer (`decoder.Block`).
      params: of all layers, stacked; the projectors of those that see the image are among them.
    """

    def __init__(self, config: ModelConfig, block: nn.Module, params: Params) -> None:
        self.config, self.block, self.params = config, block, params

    # --- Parameters --------------------------------------------------------------------------------------------------

    def layers_of(self, group: LayerGroup) -> Params:
        """The parameters of a group of layers, without their projectors."""
        layers = {name: value for name, value in self.params.items() if name != "visual_proj"}
        return take_layers(layers, group.start, group.stop)

    def projectors_of(self, group: LayerGroup) -> Params:
        """The projectors of a group that sees the image, as parameters of its blocks; none where one serves all."""
        if not self.config.per_layer_projectors:
            return {}
        return {"visual_proj": take_layers(self.params["visual_proj"], *group.projectors)}

    # --- The image ---------------------------------------------------------------------------------------------------

    def visual_kv(self, params: Params, projector: Params, x: Any, role: str) -> tuple[Any, tuple[Any, Any]]:
        """One layer's keys (not rotated) and values of the visual stream, and the stream for the next layer."""
        kv = self._apply(params | projector, "visual_kv", x)
        return self._apply(params, "update_visual", x) if role == "mlp" else x, kv

    def image_kv(self, x: Any) -> ImageKV:
        """Keys, not rotated, and values of images for every layer that sees them, from what the first layer reads."""
        outs = []
        for group in layer_groups(self.config):
            if group.reads_keys:
                layers, role = (self.layers_of(group), self.projectors_of(group)), group.role
                x, kv = self._scan(lambda x, layer, role=role: self.visual_kv(layer[0], layer[1], x, role), x, layers)
                outs.append(kv)
        return ImageKV(*jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs))

    # --- The text ----------------------------------------------------------------------------------------------------

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
        """The text through all layers.

        Args:
          stream: the text.
          visual: visual tokens, or their keys and values, layer by layer; None: there is no image.
          past: keys and values of the tokens before.
          asking: places of the text as queries; None: those that it has as keys.
          unseen: layers in which the text does not attend to the image.
          capture: what to stack over the layers: some of STACKED, kv (the query stream's own keys, rotated, and
            values; under LLaVA those of visual tokens before them).
          impl: of attention.
        """
        c, source = self.config, cast(Any, visual)
        of_text, past_mask = self._places(stream, past, asking)
        reading = Reading(source, 0 if visual is None else source.places.positions.shape[1], past_mask, capture, impl)

        past_kv = (past.k, past.v) if past is not None else None
        of_layers = past_kv, unseen, rotated_layers(c, range(c.num_layers))
        x, state = stream.x, None if visual is None else source.state
        states, outs = [(x[None], None if state is None else state[None])], []
        for group in layer_groups(c, visual is not None):
            places, together = of_text, group.role == "queries"
            if together:
                of_both = zip(source.places, stream[1:], strict=True)
                both = PackedPositions(*(jnp.concatenate(pair, axis=1) for pair in of_both))
                places = rotation(both.positions, c), make_mask(both, both, c.sliding_window)
                x, state = jnp.concatenate([cast(Any, state), x], axis=1), None
            of_visual = source.inputs(group) if group.reads_keys else None
            of_group = take_layers(of_layers, group.start, group.stop)
            body = functools.partial(self._layer, reading, group.role, *places)
            (x, state), out = self._scan(body, (x, state), (self.layers_of(group), of_visual, *of_group))
            if together:
                state, x = x[:, : reading.tokens], x[:, reading.tokens :]
            states.append(out.pop("hidden", None))
            outs.append(out)
        stack = lambda *parts: jnp.concatenate(parts)  # noqa: E731
        captured = jax.tree.map(stack, *outs)
        return x, captured | ({"hidden": jax.tree.map(stack, *states)} if "hidden" in capture else {})

    def _places(self, stream: Stream, past: KVCache | None, asking: PackedPositions | None) -> tuple[Any, Mask | None]:
        """Of the text: its rotation and the mask of its attention to itself, and that of its attention to the past."""
        window, asking = self.config.sliding_window, asking or PackedPositions(*stream[1:])
        of_text = rotation(stream.positions, self.config), make_mask(asking, stream, window)
        return of_text, None if past is None else make_mask(asking, past, window)

    def _layer(self, reading: Reading, role: str, rope: Any, mask: Mask, carry: Any, inputs: Any) -> Any:
        """A layer in which visual tokens have that role: (text, visual state), and what is captured of it."""
        (x, state), (params, of_visual, past_kv, hides, rotates) = carry, inputs
        others, tokens = [], reading.tokens
        if role in ("keys", "mlp"):
            params = self._gathered_once(params)
            state, image = reading.source.read(params, state, of_visual, role, rotates)
            others.append(image if hides is None else image._replace(mask=without(image.mask, hides)))
        elif role == "queries" and hides is not None:
            of_image = jnp.arange(x.shape[1]) < tokens
            mask = without(mask, hides & ~of_image[:, None] & of_image)
        if reading.past_mask is not None:
            others.append(KeyBlock(past_kv[0], past_kv[1], reading.past_mask))
        x, kv, attention = self._apply(params, "__call__", x, rope.where(rotates), mask, others, reading.impl)
        if self.config.alignment == "llava" and role in ("keys", "mlp"):  # in one cache with the other layers'
            kv = tuple(jnp.concatenate(pair, axis=2) for pair in zip(others[0][:2], kv, strict=True))
        hidden = (x[:, tokens:], x[:, :tokens]) if role == "queries" else (x, state)
        available = {"hidden": hidden, "kv": kv}
        if {"attention", "image_attention"} & set(reading.capture):
            available |= attention_of_text(attention, tokens, role)
        return (x, state), {name: available[name] for name in reading.capture}

    def _gathered_once(self, params: Params) -> Params:
        """A layer's parameters, with the kernels that serve both streams, `k_proj` and `v_proj`, whole on each device.

        So the compiler gathers them, and reduces their gradients, for both streams together, and not for each product.
        Not on TPUs, whose compiler hides each product's part behind the product, as a ring (docs/planning.md).
        """
        if platform() == "tpu":
            return params
        dtype, attn = jnp.dtype(self.config.dtype), dict(params.get("attn", {}))
        for name in attn.keys() & {"k_proj", "v_proj"}:
            if not isinstance(kernel := attn[name]["kernel"], tuple):  # of int8 weights, which do not train
                attn[name] = {**attn[name], "kernel": constrain(kernel.astype(dtype), None, "kv_heads", "head_dim")}
        return {**params, "attn": attn} if attn else params

    def _apply(self, params: Params, method: str, *args: Any) -> Any:
        dtype = jnp.dtype(self.config.dtype)
        params = in_dtype(dequantized(params, dtype), dtype)
        return self.block.apply({"params": params}, *args, method=method)

    def _scan(self, body: Any, carry: Any, xs: Any) -> Any:
        c = self.config
        return scan_stack(body, carry, xs, remat_policy=c.remat_policy, scan=c.scan_layers)


class Reading(NamedTuple):
    """What is the same for all layers through which the text runs."""

    source: Any  # of the image's keys and values
    tokens: int  # V
    past_mask: Mask | None
    capture: tuple[str, ...]
    impl: str
