"""Vision encoders by `model.vision.kind`: each turns uint8 images [I, height, width, 3] into features [I, P, C]."""

from __future__ import annotations

import flax.linen as nn

from saisa_jax.registry import Registry

ENCODERS: Registry[type[nn.Module]] = Registry("model.vision.kind", __name__)
