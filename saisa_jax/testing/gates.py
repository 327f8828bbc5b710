"""Flamingo's gates, which are 0 at the start: a random model would see no image."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def with_open_gates(params: Any, seed: int = 0) -> Any:
    """The parameters with gates as if trained, between 0.5 and 1.5; of a model without cross layers as they are."""
    if "cross_layers" not in params:
        return params
    names = "attn_gate", "mlp_gate"
    keys = zip(names, jax.random.split(jax.random.key(seed)), strict=True)
    crossed = params["cross_layers"]
    gates = {name: jax.random.uniform(key, jnp.shape(crossed[name]), minval=0.5, maxval=1.5) for name, key in keys}
    return {**params, "cross_layers": {**crossed, **gates}}
