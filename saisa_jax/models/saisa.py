"""SAISA (arXiv 2502.02458): visual tokens are keys and values of every layer, and nothing else.

    Z            = vision(images)                                  [B, V, C]   raw features, one tensor for all layers
    V_l          = fc2_l(gelu(fc1_l(Z)))                           [B, V, D]   projector of layer l
    h_t, h_v     = RMSNorm_in_l(x_t), RMSNorm_in_l(V_l)            the decoder's own norm serves both
    q            = rope(W_q h_t, pos_t)                            queries: text only
    k, v         = rope(W_k [h_v; h_t], [pos_v; pos_t]), W_v [h_v; h_t]      (Qwen3: rope(RMSNorm(W_q h_t)), and so k)
    x_t          = x_t + W_o attend(q, k, v, mask)
    x_t          = x_t + mlp(RMSNorm_post_l(x_t))                  the MLP: text only

The mask is one line, in `mask.py`. An alignment says what the visual tokens do besides being keys and values:

    alignment   V starts as            V as queries   V through the MLP   V from layer to layer
    llava       one projector          yes (causal)   yes                 residual stream
    naavit      one projector          no             yes                 residual stream
    saisa       a projector per layer  no             no                  nothing: projected anew for each layer
    flamingo    one projector          no             no                  nothing: read by cross layers (`cross.py`)

So there are two streams, never one sequence with holes: the query stream (text; in layers of LLaVA joined by the visual
tokens) and the visual stream. Positions and segments alone say where an image stands.

Axes: B batch, T text, V visual tokens of a row, M image slots, P visual tokens of an image, C vision width, D embed,
N query heads, K key/value heads, H head_dim, L layers, Lv layers that see the image, W vocabulary (padded).
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, Bool, Float, Int

from saisa_jax.batch import Batch, empty_batch
from saisa_jax.config import ModelConfig
from saisa_jax.models import kv_cache
from saisa_jax.models.cross import CrossedStack, init_cross_layers
from saisa_jax.models.decoder import Block, example_inputs
from saisa_jax.models.encoders import ENCODERS
from saisa_jax.models.kv_cache import ImageKV, KVCache, VisualKV
from saisa_jax.models.layers import (
    Params,
    RMSNorm,
    constrain,
    dense,
    for_float32_product,
    init_stack,
    look_up,
    named,
    rotate_keys,
    rotated_layers,
    rotation,
    with_scales,
)
from saisa_jax.models.lora import with_adapters
from saisa_jax.models.mask import PackedPositions
from saisa_jax.models.projectors import base_of, init_projectors, shared_projector
from saisa_jax.models.stack import STACKED, LayerStack
from saisa_jax.models.streams import (
    CachedVisual,
    Stream,
    StreamedVisual,
    joined,
    visual_positions,
)

CAPTURES = (*STACKED, "features", "final_norm")


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
        layers = with_scales(self, "layers", self.param("layers", self._init_layers))
        if c.alignment == "flamingo":
            crossed = with_scales(self, "cross_layers", self.param("cross_layers", init_cross_layers(c)))
            self.stack = CrossedStack(c, self.block, layers, crossed)
        else:
            self.stack = LayerStack(c, self.block, layers)
        if projector := shared_projector(c):
            self.visual_proj = projector(c)
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
            layers["visual_proj"] = init_projectors(c)(projector_key)
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
            attention [L, B, N, T, V + T], float32: columns are visual tokens, then text;
            image_attention [L, B, T]: the share of it that is on visual tokens, averaged over heads.
        """
        hidden, aux = self.hidden(batch, features, capture)
        return self.head(hidden), aux

    def hidden(
        self,
        batch: Batch,
        features: Float[Array, "B V C"] | None = None,
        capture: tuple[str, ...] = (),
        unseen: Bool[Array, " L"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """As `__call__`, but without the head: the input of the head.

        With `unseen` the text does not attend to the image in the layers that it marks (under the attention `xla`).
        """
        self._check_capture(capture)
        features = self.encode_images(batch["images"]) if features is None else features
        stream, visual = self._streams(batch, features)
        x, captured = self.stack.run(
            stream,
            self._streamed(visual, stream),
            asking=self._asking(stream, batch["image_positions"], batch["image_segment_ids"]),
            unseen=unseen,
            capture=tuple(name for name in capture if name in STACKED),
            impl=self.config.attention_impl,
        )
        x = self.final_norm(x)
        if "hidden" in captured:
            captured["hidden"], visual_hidden = captured["hidden"]
            captured |= {} if visual_hidden is None else {"visual_hidden": visual_hidden}
        captured |= {name: value for name, value in (("features", features), ("final_norm", x)) if name in capture}
        return x, captured

    def _check_capture(self, capture: tuple[str, ...]) -> None:
        unknown = set(capture) - set(CAPTURES)
        if unknown:
            raise ValueError(f"capture={sorted(unknown)} is unknown; known: {', '.join(CAPTURES)}")
        if {"attention", "image_attention"} & set(capture) and self.config.attention_impl not in ("xla", "auto"):
            raise ValueError(
                f"model.attention_impl={self.config.attention_impl} never holds the attention that capture asks for; "
                "set model.attention_impl=xla"
            )

    def encode_images(self, images: Any) -> Float[Array, "B V C"]:
        """Raw features Z of uint8 images [B, M, height, width, 3], or of slots that hold them [B, M, P, C]; V = M P."""
        rows, slots = images.shape[:2]
        if slots == 0:
            return jnp.zeros((rows, 0, self.config.vision.embed_dim), jnp.dtype(self.config.dtype))
        if jnp.issubdtype(images.dtype, jnp.floating):
            return jnp.asarray(images).reshape(rows, -1, images.shape[-1])
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

    def image_kv(self, features: Float[Array, "I _ C"]) -> ImageKV:
        """Keys and values of images for every layer; they depend on no text and on no position.

        The same `visual_kv` as in training, scanned alone. LLaVA has no equivalent: its visual tokens
        attend to whatever precedes them.
        """
        return self.stack.image_kv(self._before_layers(features))

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
        visual = None if image_kv is None else self.place_images(image_kv, batch)
        if features is not None and self.config.alignment == "llava":
            stream, tokens = self._streams(batch, features)
            held, source = (stream if tokens is None else joined(tokens, stream)), self._streamed(tokens, stream)
        else:
            held = stream = self._embed(batch)
            source = self._cached(visual, stream)
        x, captured = self.stack.run(
            stream,
            source,
            asking=self._asking(stream, batch["image_positions"], batch["image_segment_ids"]),
            capture=("kv",),
        )
        k, v = captured["kv"]
        cache = kv_cache.allocate(k, v, held.positions, held.segment_ids, visual, extra)
        return self._last_logits(x, stream), cache

    def place_images(self, image_kv: ImageKV, batch: Batch) -> VisualKV:
        """Keys and values [Lv, B, K, V, H] rotated, once, to the positions of their rows' slots."""
        positions, segment_ids = visual_positions(batch, image_kv.k.shape[3])
        if not self.config.rotates_images:
            return VisualKV(*image_kv, positions, segment_ids)
        rope = rotation(positions, self.config)
        # Flamingo's cross layers all rotate.
        rotates = None if self.config.cross_layers else rotated_layers(self.config, self.config.visible_layers)
        # Layer by layer, since they are float32 while they are rotated.
        k = jax.lax.map(lambda layer: rotate_keys(layer[0], rope.where(layer[1])), (image_kv.k, rotates))
        return VisualKV(k, image_kv.v, positions, segment_ids)

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
        visual = cache.visual
        asking = None if visual is None else self._asking(stream, visual.positions, visual.segment_ids)
        source = self._cached(visual, stream)
        x, captured = self.stack.run(stream, source, past=cache, asking=asking, capture=("kv",))
        k, v = captured["kv"]
        return self._last_logits(x, stream), kv_cache.append(cache, k, v, positions, segment_ids)

    def decode(
        self, tokens: Int[Array, " B"], positions: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float[Array, "B W"], KVCache]:
        """One more token a row."""
        segments = jnp.max(cache.segment_ids, axis=1, keepdims=True)  # a row of generation is one sample
        return self.extend(tokens[:, None], positions[:, None], segments, cache)

    def _streamed(self, visual: Stream | None, stream: Stream) -> StreamedVisual | None:
        if visual is None:
            return None
        return StreamedVisual(visual, stream, self.config, self.stack.projectors_of, self.stack.visual_kv)

    def _cached(self, visual: VisualKV | None, stream: Stream) -> CachedVisual | None:
        return None if visual is None else CachedVisual(visual, stream, self.config)

    def _last_logits(self, x: Float[Array, "B T D"], stream: Stream) -> Float[Array, "B W"]:
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

    def _asking(self, stream: Stream, positions: Any, segment_ids: Any) -> PackedPositions:
        """Places of the text as queries: its own, but for text that `frozen_prefix` lets attend to nothing.

        Args:
          stream: the text.
          positions: of images or of visual tokens [B, V].
          segment_ids: likewise.
        """
        segments = stream.segment_ids
        if self.config.frozen_prefix:
            of_sample = segments[:, :, None] == jnp.asarray(segment_ids)[:, None]  # [B, T, V]
            after = jnp.asarray(positions)[:, None] > stream.positions[:, :, None]
            segments = jnp.where(of_sample.any(axis=2) & (after | ~of_sample).all(axis=2), 0, segments)
        return PackedPositions(stream.positions, segments)

    def _streams(self, batch: Batch, features: Any) -> tuple[Stream, Stream | None]:
        """The text, and the visual stream (None: there is no image)."""
        text = self._embed(batch)
        if features.shape[1] == 0:
            return text, None
        slots = jnp.asarray(batch["image_segment_ids"])
        positions, segments = visual_positions(batch, slots.shape[1] * self.config.num_visual_tokens)
        held = jnp.repeat(slots > 0, features.shape[1] // slots.shape[1], axis=1)
        features = jnp.where(held[..., None], features, 0)
        features = constrain(features, "activation_batch", "activation_visual", "activation_embed")
        return text, Stream(self._before_layers(features), positions, segments)

    def _before_layers(self, features: Any) -> Any:
        """What the layers read: features, or the tokens of the projector that they share."""
        return self.visual_proj(features) if shared_projector(self.config) else features


def init_params(config: ModelConfig, key: Any) -> Params:
    """Random parameters, unboxed (no partitioning metadata), on the default device."""
    return meta.unbox(Saisa(config).init(key, _tiny_batch(config))["params"])


def abstract_params(config: ModelConfig, boxed: bool = False) -> Params:
    """Shapes and dtypes of the parameters, without memory; `boxed` keeps their logical axes."""
    tree = jax.eval_shape(lambda key: Saisa(config).init(key, _tiny_batch(config))["params"], jax.random.key(0))
    return tree if boxed else meta.unbox(tree)


def _tiny_batch(config: ModelConfig) -> Batch:
    return jax.tree.map(jnp.asarray, empty_batch(1, 1, 1, config.vision.image_size))


def share_to_per_layer(params: Params, config: ModelConfig, seed: int = 0) -> Params:
    """Stage 1's tree as stage 2's: every layer that sees the image starts from a copy of the shared projector.

    A kind with a `base` keeps the shared one and gets, for each layer, what makes no difference at first.

    Args:
      params: a tree with one `visual_proj` at the top level.
      config: the model with `projector.sharing = "per_layer"`.
      seed: of what is new.
    """
    if base_of(config):
        fresh = meta.unbox(init_projectors(config)(jax.random.key(seed)))
        return {**params, "layers": {**params["layers"], "visual_proj": fresh}}
    copies = len(config.visible_layers)
    stacked = jax.tree.map(lambda x: jnp.broadcast_to(x, (copies, *x.shape)), params["visual_proj"])
    rest = {name: value for name, value in params.items() if name != "visual_proj"}
    return {**rest, "layers": {**params["layers"], "visual_proj": stacked}}
