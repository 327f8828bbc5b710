"""ConvNeXt (arXiv 2201.03545): a convolutional encoder, with the parts of transformers' `ConvNextModel`.

A stem cuts the pixels into patches; each further stage halves the sides of the map and has blocks of a 7 x 7 depthwise
convolution and an MLP. The output is the raw map after the stage that `select_layer` names (-1: the last, LLaVA's
usual choice), row by row, without the norm of the classifier; later stages have no parameters.
Axes: I images, P = side * side places of the last map, C width; widths and sides differ from stage to stage.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from saisa_jax.config import VisionConfig
from saisa_jax.models.encoders import ENCODERS
from saisa_jax.models.encoders.vit import VisionMLP, convolution, cut_patches, normalized, scaled, split_by_image
from saisa_jax.models.layers import (
    Params,
    dequantized,
    for_float32_product,
    init_stack,
    layer_norm,
    named,
    scan_stack,
    with_scales,
)

KERNEL = 7  # of the depthwise convolutions
EXPANSION = 4  # of the MLPs


@jax.custom_vjp
def depthwise(x: Float[Array, "I side side C"], kernel: Float[Array, "k k 1 C"]) -> Float[Array, "I side side C"]:
    """Each channel convolved with its own kernel, padded with zeros.

    The kernel's gradient is written out, tap by tap: XLA's own (seen with jax 0.10.2) is a multiple of the true one
    on a mesh that splits the images and also has a "tensor" axis.
    """
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1]
    )


def _depthwise_forward(x: Any, kernel: Any) -> tuple[Any, tuple[Any, Any]]:
    return depthwise(x, kernel), (x, kernel)


def _depthwise_backward(saved: tuple[Any, Any], gradient: Any) -> tuple[Any, Any]:
    x, kernel = saved
    _, height, width, _ = x.shape
    edge = kernel.shape[0] // 2
    padded = jnp.pad(x, [(0, 0), (edge, edge), (edge, edge), (0, 0)])
    taps = [
        jnp.einsum(
            "ihwc,ihwc->c",
            *for_float32_product(padded[:, row : row + height, column : column + width], gradient),
            preferred_element_type=jnp.float32,
        )
        for row in range(kernel.shape[0])
        for column in range(kernel.shape[1])
    ]
    # The same convolution with the kernel turned by half a turn takes gradients back to the input.
    return depthwise(gradient, kernel[::-1, ::-1]), jnp.stack(taps).reshape(kernel.shape).astype(kernel.dtype)


depthwise.defvjp(_depthwise_forward, _depthwise_backward)


class Depthwise(nn.Module):
    """A depthwise convolution with bias; its few parameters are replicated, like a norm's."""

    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "I side side C"]) -> Float[Array, "I side side C"]:
        shape = (KERNEL, KERNEL, 1, x.shape[-1])
        init = named(nn.initializers.lecun_normal(), None, None, None, "norm")
        kernel = self.param("kernel", init, shape, self.param_dtype)
        bias = self.param("bias", named(nn.initializers.zeros, "norm"), shape[-1:], self.param_dtype)
        return depthwise(x.astype(self.dtype), kernel.astype(self.dtype)) + bias.astype(self.dtype)


class ConvNextBlock(nn.Module):
    """x + scale * MLP(norm(depthwise(x)))."""

    config: VisionConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "I side side C"]) -> Float[Array, "I side side C"]:
        c, width = self.config, x.shape[-1]
        h = Depthwise(self.dtype, self.param_dtype, name="depthwise")(x)
        h = layer_norm(c.norm_eps, self.param_dtype, "norm")(h).astype(self.dtype)
        h = VisionMLP(EXPANSION * width, c.activation, self.dtype, self.param_dtype, name="mlp")(h)
        return split_by_image(x + (scaled(self, "scale", h) if c.layer_scale else h))


class ConvNextStage(nn.Module):
    """A number of blocks, in all stages but the first after a norm and a convolution that halves the sides."""

    config: VisionConfig
    index: int
    dtype: Any
    param_dtype: Any
    scan_layers: bool
    remat_policy: str

    def setup(self) -> None:
        c, width = self.config, self.config.widths[self.index]
        if self.index:
            self.norm = layer_norm(c.norm_eps, self.param_dtype)
            self.downsample = convolution(width, self.dtype, self.param_dtype)
        self.block = ConvNextBlock(c, self.dtype, self.param_dtype, parent=None)
        init = init_stack(self.block, c.depths[self.index], jnp.zeros((1, 1, 1, width)))
        self.layers: Params = with_scales(self, "layers", self.param("layers", init))

    def __call__(self, x: Float[Array, "I above above before"]) -> Float[Array, "I side side C"]:
        if self.index:
            x = self.downsample(cut_patches(self.norm(x).astype(self.dtype), 2))

        def body(x: Any, params: Params) -> tuple[Any, None]:
            return self.block.apply({"params": dequantized(params, self.dtype)}, x), None

        return scan_stack(body, x, self.layers, remat_policy=self.remat_policy, scan=self.scan_layers)[0]


@ENCODERS.register("convnext")
class ConvNext(nn.Module):
    """Pixels to features.

    Args of the call:
      images: uint8 RGB, square, already at `image_size`.
      capture: True also returns the maps, of the stem and after each stage, each [I, side, side, width].
    """

    config: VisionConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = True
    remat_policy: str = "none"

    def setup(self) -> None:
        c = self.config
        kinds = self.dtype, self.param_dtype
        self.patch_embed = convolution(c.widths[0], *kinds)
        self.embed_norm = layer_norm(c.norm_eps, self.param_dtype)
        self.stages = [
            ConvNextStage(c, i, *kinds, self.scan_layers, self.remat_policy) for i in range(c.num_used_layers)
        ]

    def __call__(
        self, images: UInt8[Array, "I height width 3"], capture: bool = False
    ) -> tuple[Float[Array, "I P C"], tuple[Any, ...] | None]:
        pixels = normalized(images, self.config).astype(self.dtype)
        x = self.embed_norm(self.patch_embed(cut_patches(pixels, self.config.stem_size))).astype(self.dtype)
        maps = [split_by_image(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        features = maps[-1].reshape(len(images), -1, maps[-1].shape[-1])
        return features, tuple(maps) if capture else None
