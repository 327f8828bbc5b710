"""Projectors by `model.projector.kind`: each maps features [B, V, C] into the decoder's embedding space [B, V, D]."""

from __future__ import annotations

import flax.linen as nn

from saisa_jax.registry import Registry

PROJECTORS: Registry[type[nn.Module]] = Registry("model.projector.kind", __name__)
