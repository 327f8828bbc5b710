"""ViT encoders: CLIP, SigLIP and DINOv2 are one module with parts switched on or off (`VisionConfig`).

The encoder puts out one hidden state, `select_layer`, without the class token; layers after it do not exist.
Axes: I images, P patches of an image, C width.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from saisa_jax.config import VisionConfig
from saisa_jax.models.layers import (
    ACTIVATIONS,
    Params,
    dense,
    dequantized,
    init_stack,
    layer_norm,
    named,
    scan_stack,
    with_scales,
)


class VisionBlock(nn.Module):
    """A pre-norm transformer layer with biases; DINOv2 scales both of its branches."""

    config: VisionConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "I S C"]) -> Float[Array, "I S C"]:
        c = self.config
        x = x + self._scale("scale1", self._attention(layer_norm(c.norm_eps, self.param_dtype, "norm1")(x)))
        return x + self._scale("scale2", VisionMLP(c, self.dtype, self.param_dtype, name="mlp")(
            layer_norm(c.norm_eps, self.param_dtype, "norm2")(x).astype(self.dtype)))  # fmt: skip

    def _attention(self, h: Any) -> Any:
        return VisionAttention(self.config, self.dtype, self.param_dtype, name="attn")(h.astype(self.dtype))

    def _scale(self, name: str, branch: Any) -> Any:
        if not self.config.layer_scale:
            return branch
        shape = (self.config.embed_dim,)
        scale = self.param(name, named(nn.initializers.ones, "norm"), shape, self.param_dtype)
        return branch * scale.astype(branch.dtype)


class VisionAttention(nn.Module):
    """Attention of all patches (and the class token) to all."""

    config: VisionConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, h: Float[Array, "I S C"]) -> Float[Array, "I S C"]:
        c = self.config
        kinds = {"use_bias": True, "dtype": self.dtype, "param_dtype": self.param_dtype}
        heads, axes = (c.num_heads, c.embed_dim // c.num_heads), ("vision_embed", "vision_heads", "head_dim")
        q, k, v = (dense(heads, axes, name=f"{name}_proj", **kinds)(h) for name in "qkv")
        out = jax.nn.dot_product_attention(q, k, v)
        axes = ("vision_heads", "head_dim", "vision_embed")
        return dense(c.embed_dim, axes, axis=(-2, -1), name="o_proj", **kinds)(out)


class VisionMLP(nn.Module):
    """fc2(act(fc1(h)))."""

    config: VisionConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, h: Float[Array, "I S C"]) -> Float[Array, "I S C"]:
        c = self.config
        kinds = {"use_bias": True, "dtype": self.dtype, "param_dtype": self.param_dtype}
        h = ACTIVATIONS[c.activation](dense(c.mlp_dim, ("vision_embed", "vision_mlp"), name="fc1", **kinds)(h))
        return dense(c.embed_dim, ("vision_mlp", "vision_embed"), name="fc2", **kinds)(h)


class VisionEncoder(nn.Module):
    """Pixels to features.

    Args of the call:
      images: uint8 RGB, square, already at `image_size`.
      capture: True puts out the residual stream as well, [1 + layers, I, S, C]: after the embeddings (and CLIP's
        pre-norm), and after each layer.
    """

    config: VisionConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = True
    remat_policy: str = "none"

    def setup(self) -> None:
        c = self.config
        self.patch_embed = dense(
            c.embed_dim,
            (None, None, None, "vision_embed"),
            axis=(-3, -2, -1),
            use_bias=c.patch_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        # Large enough beside the patches (about 1) that an encoder from random weights sees places from the start.
        positions = named(nn.initializers.normal(0.2), None, "vision_embed")
        if c.class_token:
            init = named(nn.initializers.normal(0.02), "vision_embed")
            self.class_embedding = self.param("class_embedding", init, (c.embed_dim,), self.param_dtype)
        rows = c.num_patches + int(c.class_token)
        self.position_embedding = self.param("position_embedding", positions, (rows, c.embed_dim), self.param_dtype)
        if c.pre_norm:
            self.pre_norm = layer_norm(c.norm_eps, self.param_dtype)
        self.block = VisionBlock(c, self.dtype, self.param_dtype, parent=None)
        if c.num_used_layers:
            example = jnp.zeros((1, 1, c.embed_dim))
            layers = self.param("layers", init_stack(self.block, c.num_used_layers, example))
            self.layers: Params = with_scales(self, "layers", layers)
        if c.post_norm:
            self.post_norm = layer_norm(c.norm_eps, self.param_dtype)

    def __call__(
        self, images: UInt8[Array, "I height width 3"], capture: bool = False
    ) -> tuple[Float[Array, "I P C"], Float[Array, "entries I S C"] | None]:
        x = self.embed(images)
        states = [x[None]]
        if self.config.num_used_layers:

            def body(x: Any, params: Params) -> tuple[Any, Any]:
                x = self.block.apply({"params": dequantized(params, self.dtype)}, x)
                return x, x if capture else None

            x, hidden = scan_stack(body, x, self.layers, remat_policy=self.remat_policy, scan=self.scan_layers)
            states.append(hidden)
        features = x[:, 1:] if self.config.class_token else x
        if self.config.post_norm:
            features = self.post_norm(features)
        return features.astype(self.dtype), jnp.concatenate(states) if capture else None

    def embed(self, images: UInt8[Array, "I height width 3"]) -> Float[Array, "I S C"]:
        """Normalised pixels, cut into patches, projected, with positions."""
        c = self.config
        mean, std = jnp.asarray(c.image_mean), jnp.asarray(c.image_std)
        pixels = (images.astype(jnp.float32) / 255.0 - mean) / std
        side, patch = c.patches_per_side, c.patch_size
        pixels = pixels[:, : side * patch, : side * patch]  # torch's convolutions leave the remainder out as well
        patches = pixels.reshape(-1, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        x = self.patch_embed(patches.reshape(-1, side * side, patch, patch, 3).astype(self.dtype)).astype(jnp.float32)
        if c.class_token:
            first = jnp.broadcast_to(self.class_embedding, (x.shape[0], 1, c.embed_dim))
            x = jnp.concatenate([first.astype(x.dtype), x], axis=1)
        x = x + self.position_embedding.astype(x.dtype)
        if c.pre_norm:
            x = self.pre_norm(x)
        return x.astype(self.dtype)
