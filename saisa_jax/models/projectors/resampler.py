"""The Perceiver resampler (Flamingo, arXiv 2204.14198): learned queries read an image into fewer tokens.

Q  = learned [P, C], the same for every image
Q  = Q + attend(LN(Q), [LN(Z), LN(Q)])      `projector.num_layers` times, with ...
Q  = Q + fc2(gelu(fc1(LN(Q))))              ... `projector.num_heads` heads
V  = W LN(Q) + b                            [P, D]: P = `projector.num_tokens` visual tokens of an image
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from saisa_jax.config import ModelConfig
from saisa_jax.models.layers import ACTIVATIONS, constrain, dense, dtypes, for_float32_product, layer_norm, named
from saisa_jax.models.projectors import PROJECTORS


def _kinds(c: ModelConfig) -> dict[str, Any]:
    return {"use_bias": True, **dtypes(c)}


class ResamplerLayer(nn.Module):
    """Queries [I, P, C] read the features [I, S, C] of their image and themselves."""

    config: ModelConfig

    @nn.compact
    def __call__(self, queries: Float[Array, "I P C"], features: Float[Array, "I S C"]) -> Float[Array, "I P C"]:
        c = self.config
        width, norm = queries.shape[-1], lambda name, x: layer_norm(1e-5, jnp.dtype(c.param_dtype), name)(x)
        heads = (c.projector.num_heads, width // c.projector.num_heads)
        axes = ("vision_embed", "visual_heads", "head_dim")
        asking = norm("query_norm", queries).astype(queries.dtype)
        read = jnp.concatenate([norm("feature_norm", features).astype(queries.dtype), asking], axis=1)
        q = dense(heads, axes, name="q_proj", **_kinds(c))(asking)
        k, v = (dense(heads, axes, name=f"{name}_proj", **_kinds(c))(read) for name in "kv")
        out = jax.nn.dot_product_attention(*for_float32_product(q, k, v)).astype(q.dtype)
        queries = queries + dense(width, (*axes[1:], axes[0]), axis=(-2, -1), name="o_proj", **_kinds(c))(out)
        hidden = dense(4 * width, ("vision_embed", "visual_hidden"), name="fc1", **_kinds(c))(
            norm("mlp_norm", queries).astype(queries.dtype)
        )
        return queries + dense(width, ("visual_hidden", "vision_embed"), name="fc2", **_kinds(c))(
            ACTIVATIONS["gelu"](hidden)
        )


@PROJECTORS.register("resampler")
class Resampler(nn.Module):
    """Features [B, M * patches, C] of M images a row become [B, M * P, D]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, features: Float[Array, "B S C"]) -> Float[Array, "B V D"]:
        c = self.config
        width, dtype = features.shape[-1], jnp.dtype(c.dtype)
        images = features.reshape(-1, c.vision.num_patches, width).astype(dtype)
        # Of the size of normalised features, so that queries differ from the start.
        init = named(nn.initializers.normal(1.0), None, "vision_embed")
        learned = self.param("queries", init, (c.num_visual_tokens, width), jnp.dtype(c.param_dtype))
        x = jnp.broadcast_to(learned.astype(dtype), (len(images), *learned.shape))
        for i in range(c.projector.num_layers):
            x = ResamplerLayer(c, name=f"block_{i}")(x, images)
        x = layer_norm(1e-5, jnp.dtype(c.param_dtype), "norm")(x).astype(dtype)
        tokens = dense(c.embed_dim, ("vision_embed", None), name="out", **_kinds(c))(x)
        tokens = tokens.reshape(len(features), -1, c.embed_dim)
        return constrain(tokens, "activation_batch", "activation_visual", "activation_embed")
