"""Encoders of every kind: from pixels of any size to tokens, row by row."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from saisa_jax.config import VisionConfig
from saisa_jax.models.vision import VisionEncoder

VIT = VisionConfig(image_size=24, patch_size=8, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24)


def pictures(size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)


def test_pixels_beyond_whole_patches_are_not_read() -> None:
    params = VisionEncoder(VIT).init(jax.random.key(0), jnp.asarray(pictures(24)))
    larger = dataclasses.replace(VIT, image_size=31)
    assert larger.num_patches == VIT.num_patches == 9
    images = pictures(31)
    features, _ = VisionEncoder(larger).apply(params, jnp.asarray(images))
    cropped, _ = VisionEncoder(VIT).apply(params, jnp.asarray(images[:, :24, :24]))
    np.testing.assert_array_equal(features, cropped)
