"""ViT encoders: CLIP, SigLIP and DINOv2 (with registers or without) are one module with parts switched on or off.

The output is one hidden state, `select_layer`, without the class token and the registers; later layers have no
parameters. `VisionConfig` has the switches.
Axes: I images, P patches of an image, C width.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from saisa_jax.config import VisionConfig
from saisa_jax.models.encoders import ENCODERS
from saisa_jax.models.layers import (
    ACTIVATIONS,
    Params,
    constrain,
    dense,
    dequantized,
    for_float32_product,
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
        h = layer_norm(c.norm_eps, self.param_dtype, "norm1")(x).astype(self.dtype)
        h = VisionAttention(c, self.dtype, self.param_dtype, name="attn")(h)
        x = x + (scaled(self, "scale1", h) if c.layer_scale else h)
        h = layer_norm(c.norm_eps, self.param_dtype, "norm2")(x).astype(self.dtype)
        h = VisionMLP(c.mlp_dim, c.activation, self.dtype, self.param_dtype, name="mlp")(h)
        return split_by_image(x + (scaled(self, "scale2", h) if c.layer_scale else h))


def split_by_image(x: Float[Array, "I *rows C"]) -> Float[Array, "I *rows C"]:
    """Keeps each device to its own images. In every layer: otherwise the compiler may split the channels of all images
    over the devices, with a sum over all devices after every product."""
    return constrain(x, "activation_batch", *(x.ndim - 1) * (None,))


def scaled(block: Any, name: str, branch: Float[Array, "*rows C"]) -> Float[Array, "*rows C"]:
    """The branch of a residual block times the block's own parameter `name`, one factor a channel."""
    scale = block.param(name, named(nn.initializers.ones, "norm"), branch.shape[-1:], block.param_dtype)
    return branch * scale.astype(branch.dtype)


class VisionAttention(nn.Module):
    """Attention of all tokens (patches, class token, registers) to all."""

    config: VisionConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, h: Float[Array, "I S C"]) -> Float[Array, "I S C"]:
        c = self.config
        kinds = {"use_bias": True, "dtype": self.dtype, "param_dtype": self.param_dtype}
        heads, axes = (c.num_heads, c.embed_dim // c.num_heads), ("vision_embed", "vision_heads", "head_dim")
        q, k, v = (dense(heads, axes, name=f"{name}_proj", **kinds)(h) for name in "qkv")
        out = jax.nn.dot_product_attention(*for_float32_product(q, k, v)).astype(q.dtype)
        axes = ("vision_heads", "head_dim", "vision_embed")
        return dense(c.embed_dim, axes, axis=(-2, -1), name="o_proj", **kinds)(out)


class VisionMLP(nn.Module):
    """fc2(act(fc1(h)))."""

    hidden_dim: int
    activation: str
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, h: Float[Array, "*rows C"]) -> Float[Array, "*rows C"]:
        kinds = {"use_bias": True, "dtype": self.dtype, "param_dtype": self.param_dtype}
        hidden = dense(self.hidden_dim, ("vision_embed", "vision_mlp"), name="fc1", **kinds)(h)
        hidden = ACTIVATIONS[self.activation](hidden)
        return dense(h.shape[-1], ("vision_mlp", "vision_embed"), name="fc2", **kinds)(hidden)


def normalized(images: UInt8[Array, "I height width 3"], config: VisionConfig) -> Float[Array, "I height width 3"]:
    """Pixels normalised with the encoder's mean and standard deviation, in float32."""
    mean, std = jnp.asarray(config.image_mean), jnp.asarray(config.image_std)
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def cut_patches(x: Float[Array, "I height width C"], size: int) -> Float[Array, "I rows columns size size C"]:
    """A map cut into squares; a remainder at the right and the bottom is left out, as torch's convolutions do."""
    rows, columns = x.shape[1] // size, x.shape[2] // size
    x = x[:, : rows * size, : columns * size]
    return x.reshape(len(x), rows, size, columns, size, x.shape[-1]).swapaxes(2, 3)


def convolution(width: int, dtype: Any, param_dtype: Any, use_bias: bool = True) -> nn.DenseGeneral:
    """A convolution whose stride is its size, as a product over what `cut_patches` makes."""
    axes = (None, None, None, "vision_embed")
    return dense(width, axes, axis=(-3, -2, -1), use_bias=use_bias, dtype=dtype, param_dtype=param_dtype)


def resampled(table: Float[Array, "rows C"], config: VisionConfig) -> Float[Array, "S C"]:
    """The positions of the image's patches from those that were learnt on images of another size; bicubic.

    Encoders with registers were trained with antialiasing here, and those without were not.
    """
    old, new, first = config.positions_per_side, config.patches_per_side, int(config.class_token)
    if old == new:
        return table
    weights = jnp.asarray(_antialiased(old, new) if config.num_registers else _cubic(old, new), table.dtype)
    grid = table[first:].reshape(old, old, -1)
    grid = jnp.einsum("ai,bj,ijc->abc", weights, weights, grid, precision="highest")
    return jnp.concatenate([table[:first], grid.reshape(new * new, -1)])


def _cubic(old: int, new: int) -> np.ndarray:
    """[new, old]: torch's bicubic interpolation of one axis (a = -0.75, pixels' centres fall together)."""
    places = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        column = np.clip(np.floor(places).astype(int) + tap, 0, old - 1)  # the border is repeated
        np.add.at(weights, (np.arange(new), column), _kernel(places - np.floor(places) - tap, a=-0.75))
    return weights


def _antialiased(old: int, new: int) -> np.ndarray:
    """[new, old]: torch's with `antialias` (a = -0.5): a smaller grid is of wider means, within the border alone."""
    places = (np.arange(new) + 0.5) * old / new - 0.5
    weights = _kernel((np.arange(old) - places[:, None]) / max(old / new, 1), a=-0.5)
    return weights / weights.sum(axis=1, keepdims=True)


def _kernel(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic kernel, which is 0 from a distance of 2 on."""
    t = np.minimum(np.abs(distance), 2)
    near = ((a + 2) * t - (a + 3)) * t**2 + 1
    far = ((t - 5) * t + 8) * a * t - 4 * a
    return np.where(t <= 1, near, far)


@ENCODERS.register("vit")
class VisionEncoder(nn.Module):
    """Pixels to features.

    Args of the call:
      images: uint8 RGB, square, already at `image_size`.
      capture: True also returns the residual stream, [1 + layers, I, S, C]: after the embeddings (and CLIP's
        pre-norm), and after each layer.
    """

    config: VisionConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = True
    remat_policy: str = "none"

    def setup(self) -> None:
        c = self.config
        self.patch_embed = convolution(c.embed_dim, self.dtype, self.param_dtype, use_bias=c.patch_bias)
        # Large enough beside the patches (about 1) that an encoder from random weights tells places apart from the
        # start.
        positions = named(nn.initializers.normal(0.2), None, "vision_embed")
        if c.class_token:
            init = named(nn.initializers.normal(0.02), "vision_embed")
            self.class_embedding = self.param("class_embedding", init, (c.embed_dim,), self.param_dtype)
        if c.num_registers:
            init = named(nn.initializers.normal(0.02), None, "vision_embed")
            self.registers = self.param("registers", init, (c.num_registers, c.embed_dim), self.param_dtype)
        rows = c.positions_per_side**2 + int(c.class_token)
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
        features = x[:, x.shape[1] - self.config.num_patches :]
        if self.config.post_norm:
            features = self.post_norm(features)
        return features.astype(self.dtype), jnp.concatenate(states) if capture else None

    def embed(self, images: UInt8[Array, "I height width 3"]) -> Float[Array, "I S C"]:
        """Normalised pixels, cut into patches, projected, with positions."""
        c = self.config
        patches = cut_patches(normalized(images, c), c.patch_size)
        patches = patches.reshape(len(images), c.num_patches, *patches.shape[3:])
        x = self.patch_embed(patches.astype(self.dtype)).astype(jnp.float32)
        if c.class_token:
            first = jnp.broadcast_to(self.class_embedding, (x.shape[0], 1, c.embed_dim))
            x = jnp.concatenate([first.astype(x.dtype), x], axis=1)
        x = x + resampled(jnp.asarray(self.position_embedding, x.dtype), c)
        if c.num_registers:  # they have no place
            own = jnp.broadcast_to(self.registers, (len(x), *self.registers.shape)).astype(x.dtype)
            x = jnp.concatenate([x[:, : int(c.class_token)], own, x[:, int(c.class_token) :]], axis=1)
        if c.pre_norm:
            x = self.pre_norm(x)
        return split_by_image(x.astype(self.dtype))
