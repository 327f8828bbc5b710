"""The projector: two layers with an exact GELU between them (LLaVA-1.5's `mlp2x_gelu`; paper section 3.2)."""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float

from saisa_jax.config import ModelConfig
from saisa_jax.models.layers import ACTIVATIONS, constrain, dense, dtypes
from saisa_jax.models.projectors import PROJECTORS


@PROJECTORS.register("mlp")
class MLPProjector(nn.Module):
    """V_l = fc2_l(gelu(fc1_l(Z))): the encoder's features [B, V, C] in the decoder's embedding space [B, V, D]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, features: Float[Array, "B V C"]) -> Float[Array, "B V D"]:
        c = self.config
        kinds = {"use_bias": True, **dtypes(c)}
        hidden = dense(c.projector_dim, ("vision_embed", "visual_hidden"), name="fc1", **kinds)(features)
        hidden = constrain(ACTIVATIONS["gelu"](hidden), "activation_batch", "activation_visual", "activation_mlp")
        tokens = dense(c.embed_dim, ("visual_hidden", "embed"), name="fc2", **kinds)(hidden)
        return constrain(tokens, "activation_batch", "activation_visual", "activation_embed")
