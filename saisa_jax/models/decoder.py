"""A layer of a Llama-family decoder, divided as SAISA needs it: the visual tokens' part and the text's part.

One block serves every alignment. The text stream goes through `__call__`. The visual stream goes through `visual_kv`
alone (SAISA), or through `visual_kv` and `update_visual` (NAAViT); under LLaVA there is no visual stream: its tokens
are part of the text stream. Training's scan and the image cache call the same `visual_kv`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from saisa_jax.config import ModelConfig
from saisa_jax.models.attention import attend
from saisa_jax.models.layers import RMSNorm, Rotation, constrain, dense, dtypes, keep, rotate_keys, rotate_queries
from saisa_jax.models.mask import KeyBlock, Mask, PackedPositions, make_mask
from saisa_jax.models.projectors import PROJECTORS


class Attention(nn.Module):
    """The four projections of self-attention, and Qwen3's norms of each head's queries and keys."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        kinds = {"use_bias": c.qkv_bias, **dtypes(c)}
        self.q_proj = dense((c.num_heads, c.head_dim), ("embed", "heads", "head_dim"), **kinds)
        self.k_proj = dense((c.num_kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"), **kinds)
        self.v_proj = dense((c.num_kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"), **kinds)
        self.o_proj = dense(c.embed_dim, ("heads", "head_dim", "embed"), axis=(-2, -1), **dtypes(c))
        if c.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(c.norm_eps, jnp.dtype(c.param_dtype)) for _ in range(2))

    def keys_values(self, h: Float[Array, "B S D"]) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
        """Keys, not yet rotated, and values; head-major, as they are cached."""
        k, v = self.k_proj(h).swapaxes(1, 2), self.v_proj(h).swapaxes(1, 2)
        k = self.k_norm(k) if self.config.qk_norm else k
        axes = ("activation_batch", "activation_kv_heads", None, None)
        return constrain(k, *axes), constrain(v, *axes)

    def queries(self, h: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        """Queries, not yet rotated."""
        q = keep(self.q_proj(h), "q")
        q = self.q_norm(q) if self.config.qk_norm else q
        return constrain(q, "activation_batch", "activation_length", "activation_heads", None)


class MLP(nn.Module):
    """SwiGLU."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.gate_proj = dense(c.mlp_dim, ("embed", "mlp"), **dtypes(c))
        self.up_proj = dense(c.mlp_dim, ("embed", "mlp"), **dtypes(c))
        self.down_proj = dense(c.embed_dim, ("mlp", "embed"), **dtypes(c))

    def __call__(self, h: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        hidden = nn.silu(keep(self.gate_proj(h), "gate")) * keep(self.up_proj(h), "up")
        return self.down_proj(constrain(hidden, "activation_batch", "activation_length", "activation_mlp"))


class Block(nn.Module):
    """One decoder layer; the equations stand at the top of `models/saisa.py`."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.input_norm = RMSNorm(c.norm_eps, jnp.dtype(c.param_dtype))
        self.attn = Attention(c)
        self.post_attn_norm = RMSNorm(c.norm_eps, jnp.dtype(c.param_dtype))
        self.mlp = MLP(c)
        if c.per_layer_projectors:
            self.visual_proj = PROJECTORS[c.projector.kind](c)

    def visual_kv(self, visual: Float[Array, "B _ _"]) -> tuple[Float[Array, "B K V H"], Float[Array, "B K V H"]]:
        """Keys (not rotated) and values of visual tokens: k, v of RMSNorm_in(V_l).

        Args:
          visual: what the layer's own projector reads, mostly raw features Z [B, V, C]; without one, tokens [B, V, D].
        """
        tokens = self.visual_proj(visual) if self.config.per_layer_projectors else visual
        return self.attn.keys_values(self.input_norm(tokens))

    def update_visual(self, visual: Float[Array, "B V D"]) -> Float[Array, "B V D"]:
        """NAAViT's visual tokens are not queries, but go through the MLP and keep a residual stream."""
        visual = visual + self.mlp(self.post_attn_norm(visual))
        return constrain(visual, "activation_batch", "activation_visual", "activation_embed")

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: Rotation,
        mask: Mask,
        others: Sequence[KeyBlock] = (),
        impl: str = "xla",
    ) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B K T H"], Float[Array, "B K T H"]], Any]:
        """The query stream through one layer.

        Args:
          x: the residual stream.
          rope: rotation of its rows.
          mask: of the stream's attention to itself.
          others: further keys and values: the image, the past; keys already rotated.
          impl: of attention (`attention.py`).

        Returns:
          The residual stream after the layer, its own keys (rotated) and values, and the attention weights over
          [others..., own], float32 [B, N, T, S] (None unless `impl` is xla).
        """
        h = self.input_norm(x)
        q = rotate_queries(self.attn.queries(h), rope)
        k, v = self.attn.keys_values(h)
        k = rotate_keys(k, rope)
        out, weights = attend(q, [*others, KeyBlock(k, v, mask)], impl)
        x = x + self.attn.o_proj(out)
        x = x + self.mlp(self.post_attn_norm(x))
        x = constrain(x, "activation_batch", "activation_length", "activation_embed")
        return x, (k, v), weights


def example_inputs(config: ModelConfig) -> tuple[Any, ...]:
    """Inputs of the smallest legal shape, from which `Block.init` makes its parameters."""
    half = config.head_dim // 2
    zeros = jnp.zeros((1, 1, half))
    where = PackedPositions(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
    return jnp.zeros((1, 1, config.embed_dim)), Rotation(zeros, zeros), make_mask(where, where)
