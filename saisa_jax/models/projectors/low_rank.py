"""A low-rank part for each layer beside one projector for all ("Just MLPs", arXiv 2609.34972).

    V_l = E(Z) + silu(E(Z) D_l) U_l       E(Z) = fc2(gelu(fc1(Z))), one for all layers; D_l [D, rank], U_l [rank, D]

U_l is zero at first, so that stage 2 starts at exactly the model that stage 1 has trained with E alone. Of 7B with rank
128 the layers have 33.6 million parameters between them, where a projector for each has 671 million.
"""

from __future__ import annotations

from typing import ClassVar

import flax.linen as nn
from jaxtyping import Array, Float

from saisa_jax.config import ModelConfig
from saisa_jax.models.layers import constrain, dense, dtypes
from saisa_jax.models.projectors import PROJECTORS
from saisa_jax.models.projectors.mlp import MLPProjector


@PROJECTORS.register("low_rank")
class LowRankProjector(nn.Module):
    """One layer's half: tokens E(Z) [B, V, D] of the shared projector become V_l [B, V, D]."""

    config: ModelConfig
    base: ClassVar[type[nn.Module]] = MLPProjector

    @nn.compact
    def __call__(self, tokens: Float[Array, "B V D"]) -> Float[Array, "B V D"]:
        c = self.config
        hidden = nn.silu(dense(c.projector.rank, ("embed", "visual_hidden"), name="down", **dtypes(c))(tokens))
        hidden = constrain(hidden, "activation_batch", "activation_visual", "activation_mlp")
        up = dense(c.embed_dim, ("visual_hidden", "embed"), name="up", kernel_init=nn.initializers.zeros, **dtypes(c))
        return constrain(tokens + up(hidden), "activation_batch", "activation_visual", "activation_embed")
