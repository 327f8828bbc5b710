"""SAISA (arXiv 2502.02458): visual tokens are keys and values of every layer, and nothing else.

    Z            = vision(images)                                  [B, V, C]   raw features, one tensor for all layers
    V_l          = fc2_l(gelu(fc1_l(Z)))                           [B, V, D]   projector of layer l
    h_t, h_v     = RMSNorm_in_l(x_t), RMSNorm_in_l(V_l)            the decoder's own norm serves both
    q            = rope(W_q h_t, pos_t)                            queries: text only
    k, v         = rope(W_k [h_v; h_t], [pos_v; pos_t]), W_v [h_v; h_t]
    x_t          = x_t + W_o attend(q, k, v, mask)
    x_t          = x_t + mlp(RMSNorm_post_l(x_t))                  the MLP: text only

The mask is one line, in `mask.py`. An alignment says what the visual tokens do besides being keys and values:

    alignment   V starts as            V as queries   V through the MLP   V from layer to layer
    llava       one projector          yes (causal)   yes                 residual stream
    naavit      one projector          no             yes                 residual stream
    saisa       a projector per layer  no             no                  nothing: projected anew for each layer

So there are two streams, never one sequence with holes: the query stream (text; under LLaVA joined by the visual
tokens) and the visual stream. Positions and segments alone say where an image stands.

Axes: B batch, T text, V visual tokens of a row, M image slots, P visual tokens of an image, C vision width, D embed,
N query heads, K key/value heads, H head_dim, L layers, Lv layers that see the image, W vocabulary (padded).
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, Float, Int

from saisa_jax.batch import Batch, empty_batch
from saisa_jax.config import ModelConfig
from saisa_jax.models import kv_cache
from saisa_jax.models.decoder import Block, example_inputs
from saisa_jax.models.encoders import ENCODERS
from saisa_jax.models.kv_cache import ImageKV, KVCache, VisualKV
from saisa_jax.models.layers import (
    Params,
    RMSNorm,
    constrain,
    dense,
    dequantized,
    for_float32_product,
    init_stack,
    look_up,
    named,
    rotate_keys,
    rotation,
    scan_stack,
    take_layers,
    with_scales,
)
from saisa_jax.models.lora import in_dtype, with_adapters
from saisa_jax.models.mask import KeyBlock, make_mask
from saisa_jax.models.projectors import PROJECTORS
from saisa_jax.models.streams import CachedVisual, LayerGroup, Stream, StreamedVisual, layer_groups, visual_positions

STACKED_CAPTURES = ("hidden", "attention")  # one entry a layer
CAPTURES = (*STACKED_CAPTURES, "features", "final_norm")


class Saisa(nn.Module):
    """The whole model: vision encoder, projectors, decoder, head."""

    config: ModelConfig
    block_class: ClassVar[type[Block]] = Block  # a subclass may bring another layer: docs/extending.md

    def setup(self) -> None:
        c = self.config
        dtype, param_dtype = jnp.dtype(c.dtype), jnp.dtype(c.param_dtype)
        self.embed_tokens = nn.Embed(
            c.padded_vocab_size,
            c.embed_dim,
            dtype=dtype,
            param_dtype=param_dtype,
            embedding_init=named(nn.initializers.normal(0.02), "vocab", "embed"),
        )
        self.vision = ENCODERS[c.vision.kind](c.vision, dtype, param_dtype, c.scan_layers, c.remat_policy)
        self.block = with_adapters(self.block_class(c, parent=None), c.lora, ("__call__", "visual_kv", "update_visual"))
        self.layers: Params = with_scales(self, "layers", self.param("layers", self._init_layers))
        if not c.per_layer_projectors:
            self.visual_proj = PROJECTORS[c.projector.kind](c)
        self.final_norm = RMSNorm(c.norm_eps, param_dtype)
        if not c.tie_embeddings:
            self.lm_head = dense(
                c.padded_vocab_size, ("embed", "vocab"), dtype=dtype, param_dtype=param_dtype, float32_output=True
            )

    def _init_layers(self, key: Any) -> Params:
        c = self.config
        layers_key, projector_key = jax.random.split(key)
        layers = init_stack(self.block, c.num_layers, *example_inputs(c))(layers_key)
        if c.per_layer_projectors:
            example = jnp.zeros((1, 1, c.vision.embed_dim))
            projector = init_stack(PROJECTORS[c.projector.kind](c, parent=None), len(c.visible_layers), example)
            layers["visual_proj"] = projector(projector_key)
        return layers

    # --- Whole sequences: training, scoring, captures ----------------------------------------------------------------

    def __call__(
        self, batch: Batch, features: Float[Array, "B V C"] | None = None, capture: tuple[str, ...] = ()
    ) -> tuple[Float[Array, "B T W"], dict[str, Any]]:
        """Logits of every text token.

        Args:
          batch: tokens, images and their places (`saisa_jax.batch`).
          features: raw vision features to use instead of encoding `batch["images"]`.
          capture: what else to return, of CAPTURES. With nothing captured the program is the same as without it.

        Returns:
          float32 logits [B, T, W], -inf beyond the vocabulary, and a dictionary of what was captured:
            features [B, V, C]; final_norm [B, T, D];
            hidden [1 + L, B, T, D]: the text's residual stream, before the first and after every layer;
            visual_hidden [1 + L, B, V, D]: the same of the visual tokens (llava and naavit);
            attention [L, B, N, T, V + T], float32: columns are visual tokens, then text.
        """
        hidden, aux = self.hidden(batch, features, capture)
        return self.head(hidden), aux

    def hidden(
        self, batch: Batch, features: Float[Array, "B V C"] | None = None, capture: tuple[str, ...] = ()
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """As `__call__`, but without the head: the input of the head."""
        self._check_capture(capture)
        features = self.encode_images(batch["images"]) if features is None else features
        stream, visual = self._streams(batch, features)
        source = None
        if visual is not None:
            source = StreamedVisual(visual, stream, self.config, self.projectors_of, self.visual_kv)
        stacked = tuple(name for name in capture if name in STACKED_CAPTURES)
        x, captured = self._run_layers(stream, source, capture=stacked, impl=self.config.attention_impl)
        length = batch["tokens"].shape[1]
        x = self.final_norm(x[:, -length:])  # under LLaVA visual tokens stand first
        captured = self._name_captured(captured, length)
        captured |= {name: value for name, value in (("features", features), ("final_norm", x)) if name in capture}
        return x, captured

    def _check_capture(self, capture: tuple[str, ...]) -> None:
        unknown = set(capture) - set(CAPTURES)
        if unknown:
            raise ValueError(f"capture={sorted(unknown)} is unknown; known: {', '.join(CAPTURES)}")
        if "attention" in capture and self.config.attention_impl not in ("xla", "auto"):
            raise ValueError(
                f"model.attention_impl={self.config.attention_impl} never holds the attention that capture asks for; "
                "set model.attention_impl=xla"
            )

    def encode_images(self, images: Any) -> Float[Array, "B V C"]:
        """Raw features Z of uint8 images [B, M, height, width, 3]; V = M * P."""
        rows, slots = images.shape[:2]
        if slots == 0:
            return jnp.zeros((rows, 0, self.config.vision.embed_dim), jnp.dtype(self.config.dtype))
        features, _ = self.vision(jnp.asarray(images).reshape(rows * slots, *images.shape[2:]))
        return features.reshape(rows, -1, features.shape[-1])

    def head(self, x: Float[Array, "B T D"]) -> Float[Array, "B T W"]:
        """float32 logits; the padding of the vocabulary gets -inf."""
        if self.config.tie_embeddings:
            embedding = self.embed_tokens.embedding.astype(x.dtype)
            logits = jnp.einsum("btd,wd->btw", *for_float32_product(x, embedding), preferred_element_type=jnp.float32)
        else:
            logits = self.lm_head(x)
        logits = constrain(logits, "activation_batch", "activation_length", "activation_vocab")
        inside = jnp.arange(self.config.padded_vocab_size) < self.config.vocab_size
        return jnp.where(inside, logits, -jnp.inf)

    # --- Generation --------------------------------------------------------------------------------------------------

    def image_kv(self, features: Float[Array, "I P C"]) -> ImageKV:
        """Keys and values of images for every layer; they depend on no text and on no position.

        The same `Block.visual_kv` as in training, scanned alone. LLaVA has no equivalent: its visual tokens
        attend to whatever precedes them.
        """
        x = features if self.config.per_layer_projectors else self.visual_proj(features)
        outs = []
        for group in layer_groups(self.config):
            if group.sees_image:
                layers = self._layers_of(group), self.projectors_of(group)
                x, kv = self._scan(lambda x, layer: self.visual_kv(layer[0], layer[1], x), x, layers)
                outs.append(kv)
        return ImageKV(*jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs))

    def prefill(
        self,
        batch: Batch,
        extra: int,
        features: Float[Array, "B V C"] | None = None,
        image_kv: ImageKV | None = None,
    ) -> tuple[Float[Array, "B W"], KVCache]:
        """Processes prompts: logits after each row's last token, and a cache with room for `extra` tokens.

        Args:
          batch: prompts. Without `images`, if one of the next two is given.
          extra: columns of the cache beyond those of the prompts.
          features: raw vision features of the rows' image slots.
          image_kv: keys and values of the rows' image slots [Lv, B, K, V, H] (not under LLaVA).
        """
        if image_kv is None:
            features = self.encode_images(batch["images"]) if features is None else features
            if self.config.alignment != "llava" and features.shape[1] > 0:
                image_kv = self.image_kv(features)
        if features is not None and self.config.alignment == "llava":
            stream, _ = self._streams(batch, features)
        else:
            stream = self._embed(batch)
        visual = None if image_kv is None else self.place_images(image_kv, batch)
        x, captured = self._run_layers(stream, self._cached(visual, stream), capture=("kv",))
        k, v = captured["kv"]
        cache = kv_cache.allocate(k, v, stream.positions, stream.segment_ids, visual, extra)
        return self._last_logits(x, stream), cache

    def place_images(self, image_kv: ImageKV, batch: Batch) -> VisualKV:
        """Keys and values [Lv, B, K, V, H] rotated, once, to the positions of their rows' slots."""
        positions, segment_ids = visual_positions(batch, image_kv.k.shape[3])
        rope = rotation(positions, self.config)
        return VisualKV(rotate_keys(image_kv.k, rope), image_kv.v, positions, segment_ids)

    def extend(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache: KVCache,
    ) -> tuple[Float[Array, "B W"], KVCache]:
        """Processes T more tokens a row: logits after the last one, and the cache with them.

        Rows are padded on the right, to the same number of tokens (segment 0); padding leaves no column behind.
        """
        stream = Stream(look_up(self.embed_tokens, tokens), positions, segment_ids)
        x, captured = self._run_layers(stream, self._cached(cache.visual, stream), past=cache, capture=("kv",))
        k, v = captured["kv"]
        return self._last_logits(x, stream), kv_cache.append(cache, k, v, positions, segment_ids)

    def decode(
        self, tokens: Int[Array, " B"], positions: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float[Array, "B W"], KVCache]:
        """One more token a row."""
        segments = jnp.max(cache.segment_ids, axis=1, keepdims=True)  # a row of generation is one sample
        return self.extend(tokens[:, None], positions[:, None], segments, cache)

    def _cached(self, visual: VisualKV | None, stream: Stream) -> CachedVisual | None:
        return None if visual is None else CachedVisual(visual, stream, self.config)

    def _last_logits(self, x: Float[Array, "B S D"], stream: Stream) -> Float[Array, "B W"]:
        # The last token is the one of the highest position, on whichever side the padding is.
        last = jnp.argmax(jnp.where(stream.segment_ids > 0, stream.positions, -1), axis=1)
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)
        return self.head(self.final_norm(x))[:, 0]

    # --- The streams -------------------------------------------------------------------------------------------------

    def _embed(self, batch: Batch) -> Stream:
        segments = jnp.asarray(batch["segment_ids"])
        x = look_up(self.embed_tokens, jnp.asarray(batch["tokens"]))
        # Padding is removed before any product, so that nothing in it can reach a result or a gradient.
        return Stream(jnp.where(segments[..., None] > 0, x, 0), jnp.asarray(batch["positions"]), segments)

    def _streams(self, batch: Batch, features: Any) -> tuple[Stream, Stream | None]:
        """The query stream, and the visual stream (None: there is none, or it is part of the queries)."""
        text = self._embed(batch)
        if features.shape[1] == 0:
            return text, None
        positions, segments = visual_positions(batch, features.shape[1])
        features = jnp.where(segments[..., None] > 0, features, 0)
        features = constrain(features, "activation_batch", "activation_visual", "activation_embed")
        x = features if self.config.per_layer_projectors else self.visual_proj(features)
        visual = Stream(x, positions, segments)
        if self.config.alignment != "llava":
            return text, visual
        return Stream(*(jnp.concatenate(pair, axis=1) for pair in zip(visual, text, strict=True))), None

    # --- The layers --------------------------------------------------------------------------------------------------

    def _layers_of(self, group: LayerGroup) -> Params:
        """The parameters of a group of layers, without their projectors."""
        layers = {name: value for name, value in self.layers.items() if name != "visual_proj"}
        return take_layers(layers, group.start, group.stop)

    def projectors_of(self, group: LayerGroup) -> Params:
        """The projectors of a group that sees the image, as parameters of its blocks; none where one serves all."""
        if not self.config.per_layer_projectors:
            return {}
        return {"visual_proj": take_layers(self.layers["visual_proj"], *group.projectors)}

    def visual_kv(self, params: Params, projector: Params, x: Any) -> tuple[Any, tuple[Any, Any]]:
        """One layer's keys (not rotated) and values of the visual stream, and the stream for the next layer."""
        kv = self._block(params | projector, "visual_kv", x)
        return self._block(params, "update_visual", x) if self.config.alignment == "naavit" else x, kv

    def _block(self, params: Params, method: str, *args: Any) -> Any:
        dtype = jnp.dtype(self.config.dtype)
        params = in_dtype(dequantized(params, dtype), dtype)
        return self.block.apply({"params": params}, *args, method=method)

    def _scan(self, body: Any, carry: Any, xs: Any) -> Any:
        c = self.config
        return scan_stack(body, carry, xs, remat_policy=c.remat_policy, scan=c.scan_layers)

    def _run_layers(
        self,
        stream: Stream,
        visual: StreamedVisual | CachedVisual | None,
        past: KVCache | None = None,
        capture: tuple[str, ...] = (),
        impl: str = "xla",
    ) -> tuple[Any, dict[str, Any]]:
        """The query stream through all layers.

        Args:
          stream: the queries.
          visual: keys and values of the image, layer by layer; None: there is no image.
          past: keys and values of the tokens before.
          capture: what to stack over the layers: hidden, attention, kv (the stream's own keys, rotated, and values).
          impl: of attention.
        """
        c = self.config
        rope, mask = rotation(stream.positions, c), make_mask(stream, stream, c.sliding_window)
        past_mask = None if past is None else make_mask(stream, past, c.sliding_window)

        def layer(sees_image: bool, carry: Any, inputs: Any) -> Any:
            (x, visual_state), (params, visual_inputs, past_kv) = carry, inputs
            others = []
            if visual is not None and sees_image:
                visual_state, image = visual.read(params, visual_state, visual_inputs)
                others.append(image)
            if past_mask is not None:
                others.append(KeyBlock(past_kv[0], past_kv[1], past_mask))
            x, kv, attention = self._block(params, "__call__", x, rope, mask, others, impl)
            if (
                "attention" in capture and visual is not None and not sees_image
            ):  # columns for the image, which it does not attend to
                attention = jnp.pad(attention, [(0, 0)] * 3 + [(visual.length, 0)])
            available = {"hidden": (x, visual_state), "attention": attention, "kv": kv}
            return (x, visual_state), {name: available[name] for name in capture}

        carry = first = (stream.x, None if visual is None else visual.state)
        outs = []
        for group in layer_groups(c, visual is not None):
            of_image = visual.inputs(group) if visual is not None and group.sees_image else None
            of_past = None if past is None else take_layers((past.k, past.v), group.start, group.stop)
            body = functools.partial(layer, group.sees_image)
            carry, out = self._scan(body, carry, (self._layers_of(group), of_image, of_past))
            outs.append(out)
        captured = jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)
        if "hidden" in captured:
            captured["hidden"] = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, captured["hidden"])
        return carry[0], captured

    def _name_captured(self, captured: dict[str, Any], text_length: int) -> dict[str, Any]:
        """Captured arrays under their public names and shapes, LLaVA's joined stream split again."""
        aux: dict[str, Any] = {}
        if "hidden" in captured:
            x, stream = captured["hidden"]
            aux["hidden"] = x[:, :, -text_length:]
            if self.config.alignment == "llava" and x.shape[2] > text_length:
                aux["visual_hidden"] = x[:, :, :-text_length]
            elif self.config.alignment == "naavit" and stream is not None:
                aux["visual_hidden"] = stream
        if "attention" in captured:
            aux["attention"] = captured["attention"][:, :, :, -text_length:]
        return aux


def init_params(config: ModelConfig, key: Any) -> Params:
    """Random parameters, unboxed (no partitioning metadata), on the default device."""
    return meta.unbox(Saisa(config).init(key, _tiny_batch(config))["params"])


def abstract_params(config: ModelConfig, boxed: bool = False) -> Params:
    """Shapes and dtypes of the parameters, without memory; `boxed` keeps their logical axes."""
    tree = jax.eval_shape(lambda key: Saisa(config).init(key, _tiny_batch(config))["params"], jax.random.key(0))
    return tree if boxed else meta.unbox(tree)


def _tiny_batch(config: ModelConfig) -> Batch:
    return jax.tree.map(jnp.asarray, empty_batch(1, 1, 1, config.vision.image_size))


def share_to_per_layer(params: Params, config: ModelConfig) -> Params:
    """Stage 1's tree as stage 2's: every layer that sees the image starts from a copy of the shared projector.

    Args:
      params: a tree with one `visual_proj` at the top level.
      config: the model with `projector.sharing = "per_layer"`.
    """
    copies = len(config.visible_layers)
    stacked = jax.tree.map(lambda x: jnp.broadcast_to(x, (copies, *x.shape)), params["visual_proj"])
    rest = {name: value for name, value in params.items() if name != "visual_proj"}
    return {**rest, "layers": {**params["layers"], "visual_proj": stacked}}
