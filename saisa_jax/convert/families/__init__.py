"""Families of weights: encoders by `model.vision.family`, decoders by the `model_type` of their config.json."""

from __future__ import annotations

from saisa_jax.convert.family import DecoderFamily, EncoderFamily
from saisa_jax.registry import Registry

ENCODERS: Registry[EncoderFamily] = Registry("model.vision.family", __name__)
DECODERS: Registry[DecoderFamily] = Registry("model_type", __name__)
