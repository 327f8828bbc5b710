"""Projectors by `model.projector.kind`: each maps features [B, V, C] into the decoder's embedding space [B, V, D].

A kind with an attribute `base` has two halves: the projector `base`, one for all layers, and the kind itself, which
makes each layer's tokens of the base's. `projector.sharing=shared` is then the base alone, and what trains in stage 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from saisa_jax.config import ModelConfig
from saisa_jax.models.layers import Params, init_stack
from saisa_jax.registry import Registry

PROJECTORS: Registry[type[nn.Module]] = Registry("model.projector.kind", __name__)


def base_of(config: ModelConfig) -> type[nn.Module] | None:
    """The half of the configured kind that all layers share; None: it has none."""
    return getattr(PROJECTORS[config.projector.kind], "base", None)


def shared_projector(config: ModelConfig) -> type[nn.Module] | None:
    """The projector before the layers, whose tokens they read; None: they read the features."""
    base = base_of(config)
    return base if config.per_layer_projectors else base or PROJECTORS[config.projector.kind]


def init_projectors(config: ModelConfig) -> Callable[[Any], Params]:
    """An initializer of the projectors of all layers that see the image, stacked."""
    patches, vision = config.vision.num_patches, config.vision.embed_dim
    example = jnp.zeros((1, patches, config.embed_dim if base_of(config) else vision))
    return init_stack(PROJECTORS[config.projector.kind](config, parent=None), len(config.visible_layers), example)
