"""Encoders of every kind: from pixels of any size to tokens, row by row."""

from __future__ import annotations

import dataclasses
import runpy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saisa_jax.config import VisionConfig
from saisa_jax.models.encoders import ENCODERS
from saisa_jax.models.encoders.convnext import ConvNext, depthwise
from saisa_jax.models.encoders.vit import VisionEncoder
from saisa_jax.models.saisa import Saisa, init_params
from saisa_jax.registry import UnknownNameError
from saisa_jax.testing.batches import IMAGE, make_batch
from saisa_jax.testing.configs import tiny_config


def test_an_encoder_is_found_by_its_kind() -> None:
    assert set(ENCODERS) == {"convnext", "vit"} and ENCODERS["vit"] is VisionEncoder
    with pytest.raises(UnknownNameError, match=r"model.vision.kind='resnet' is not one of convnext, vit"):
        ENCODERS["resnet"]


VIT = VisionConfig(image_size=24, patch_size=8, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24)
CONVNEXT = VisionConfig(
    kind="convnext",
    image_size=40,
    patch_size=8,
    embed_dim=24,
    num_layers=2,
    depths=(3, 2),
    widths=(16, 24),
    layer_scale=True,
    class_token=False,
    pre_norm=False,
    select_layer=-1,
)


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


def test_convnext_puts_out_its_last_map_row_by_row() -> None:
    encoder = ConvNext(CONVNEXT)
    images = jnp.asarray(pictures(40))
    params = encoder.init(jax.random.key(0), images)
    features, maps = encoder.apply(params, images, capture=True)
    assert features.shape == (2, CONVNEXT.num_patches, CONVNEXT.embed_dim) == (2, 25, 24)
    assert [x.shape for x in maps] == [(2, 10, 10, 16), (2, 10, 10, 16), (2, 5, 5, 24)]
    np.testing.assert_array_equal(features[:, 7], maps[-1][:, 1, 2])


def test_convnext_reads_whole_patches_of_any_size() -> None:
    params = ConvNext(CONVNEXT).init(jax.random.key(0), jnp.asarray(pictures(40)))
    larger = dataclasses.replace(CONVNEXT, image_size=55)
    features, _ = ConvNext(larger).apply(params, jnp.asarray(pictures(55)))
    assert features.shape == (2, larger.num_patches, 24) == (2, 36, 24)


def test_gradients_of_the_depthwise_convolution() -> None:
    rng = np.random.default_rng(0)
    sizes = (2, 9, 9, 4), (7, 7, 1, 4), (2, 9, 9, 4)
    x, kernel, out = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes)
    layer = nn.Conv(4, (7, 7), padding=3, feature_group_count=4, use_bias=False)
    expected = jax.grad(lambda x, k: (out * layer.apply({"params": {"kernel": k}}, x)).sum(), (0, 1))(x, kernel)
    gradients = jax.grad(lambda x, k: (out * depthwise(x, k)).sum(), (0, 1))(x, kernel)
    for gradient, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{"scan_layers": False}, {"remat_policy": "full"}])
def test_convnext_scanned_is_unrolled(options: dict[str, object]) -> None:
    images = jnp.asarray(pictures(40))
    params = ConvNext(CONVNEXT).init(jax.random.key(0), images)
    features, _ = ConvNext(CONVNEXT).apply(params, images)
    np.testing.assert_allclose(ConvNext(CONVNEXT, **options).apply(params, images)[0], features, rtol=0, atol=1e-5)


def test_earlier_stages_of_a_convnext() -> None:
    earlier = dataclasses.replace(CONVNEXT, select_layer=1, embed_dim=16, patch_size=4)
    images = jnp.asarray(pictures(40))
    params = ConvNext(CONVNEXT).init(jax.random.key(0), images)
    _, maps = ConvNext(CONVNEXT).apply(params, images, capture=True)
    kept = {name: value for name, value in params["params"].items() if name != "stages_1"}
    assert jax.tree.structure(kept) == jax.tree.structure(ConvNext(earlier).init(jax.random.key(0), images)["params"])
    features, _ = ConvNext(earlier).apply({"params": kept}, images)
    np.testing.assert_allclose(features, maps[1].reshape(2, 100, 16), rtol=0, atol=1e-6)


POOLED = '''
import flax.linen as nn
import jax.numpy as jnp

from saisa_jax.models.encoders import ENCODERS
from saisa_jax.models.encoders.vit import cut_patches, normalized
from saisa_jax.models.layers import dense


@ENCODERS.register("pooled")
class PooledPixels(nn.Module):
    """A product over the mean colour of each patch."""

    config: object
    dtype: object = jnp.float32
    param_dtype: object = jnp.float32
    scan_layers: bool = True
    remat_policy: str = "none"

    @nn.compact
    def __call__(self, images, capture=False):
        patches = cut_patches(normalized(images, self.config), self.config.patch_size)
        colors = patches.mean(axis=(3, 4)).reshape(len(images), -1, 3)
        return dense(self.config.embed_dim, (None, "vision_embed"), name="colors")(colors), None
'''


def test_an_encoder_of_ones_own_is_one_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ENCODERS, "_entries", dict(ENCODERS))
    (tmp_path / "pooled.py").write_text(POOLED)
    runpy.run_path(str(tmp_path / "pooled.py"))
    config = dataclasses.replace(tiny_config().model, vision=dataclasses.replace(VIT, kind="pooled"))
    params = init_params(config, jax.random.key(0))
    assert params["vision"]["colors"]["kernel"].shape == (3, VIT.embed_dim)
    batch = make_batch(config, [[IMAGE, 5, 6]])
    seen, _ = Saisa(config).apply({"params": params}, batch)
    other, _ = Saisa(config).apply({"params": params}, dict(batch, images=255 - batch["images"]))
    assert np.abs(seen - other)[..., : config.vocab_size].max() > 1e-4
