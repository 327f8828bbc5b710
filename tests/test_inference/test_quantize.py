"""int8 weights: the bytes, the error, and the agreement with the model they came from."""

import dataclasses

import jax
import numpy as np
import pytest

from saisa_jax.checkpoints import save_model
from saisa_jax.checkpoints.checksums import flatten
from saisa_jax.config import ConfigError, VisionConfig
from saisa_jax.inference.model import load
from saisa_jax.inference.quantize import quantize, variables_of
from saisa_jax.models.layers import dequantized
from saisa_jax.models.saisa import Saisa, init_params
from saisa_jax.testing.batches import IMAGE, make_batch

qwix = pytest.importorskip("qwix", reason="needs qwix (optional)")


def test_int8_is_within_half_a_step_of_every_weight_and_runs(model):
    config, small = model.model_config, quantize(model.params)
    before, after = flatten(model.params), flatten(small.params)
    scales = flatten(small.scales)
    projections = [path for path in before if "layers/" in path and path.endswith("/kernel")]
    assert set(scales) == set(projections) and len(projections) >= 13
    for path in before:
        if path not in scales:
            assert after[path] is before[path]
            continue
        assert after[path].dtype == np.int8 and after[path].shape == before[path].shape
        restored = dequantized((after[path], scales[path]), np.float32)
        assert float(np.max(np.abs(restored - before[path]) / scales[path])) <= 0.501
    wide = sum(before[path].nbytes for path in projections)
    assert sum(after[path].nbytes + scales[path].nbytes for path in projections) < 0.4 * wide

    batch = make_batch(config, [[1, IMAGE, 5, 6], [3, 4, 5]], text_length=4, max_images=1)
    run = jax.jit(lambda variables: Saisa(config).apply(variables, batch)[0])
    exact, rounded = run(variables_of(model.params)), run(variables_of(small))
    inside = slice(config.vocab_size)
    error = np.abs(exact - rounded)[..., inside].max() / np.std(exact[..., inside])
    assert 0 < error < 0.15


def test_a_convnext_in_int8_sees_about_the_same(model):
    vision = VisionConfig(
        kind="convnext", image_size=40, patch_size=8, embed_dim=24, num_layers=2, depths=(3, 2), widths=(16, 24),
        layer_scale=True, class_token=False, pre_norm=False, patch_bias=True, select_layer=-1,
    )  # fmt: skip
    config = dataclasses.replace(model.model_config, vision=vision)
    params = init_params(config, jax.random.key(0))
    small = quantize(params)
    assert any(path.startswith("vision/") for path in flatten(small.scales))
    assert not any("/depthwise/" in path for path in flatten(small.scales))
    images = np.random.default_rng(0).integers(0, 256, (1, 1, 40, 40, 3), dtype=np.uint8)
    encode = jax.jit(lambda variables: Saisa(config).apply(variables, images, method="encode_images"))
    exact, rounded = encode(variables_of(params)), encode(variables_of(small))
    assert 0 < np.abs(exact - rounded).max() < 0.05 * np.std(exact)


def test_load_with_int8_answers(tiny_model, pictures, tmp_path):
    whole = tiny_model("saisa")
    save_model(tmp_path / "model", whole.params, whole.config, whole.tokenizer, {"stage": "finetune"})
    small = load(str(tmp_path / "model"), quantize="int8")
    assert len(small.generate(["is it red?"], [[pictures[0]]], max_new_tokens=3)) == 1
    assert small.attention("is it red?", [pictures[0]]).shape == whole.attention("is it red?", [pictures[0]]).shape
    with pytest.raises(ConfigError, match="int4"):
        load(str(tmp_path / "model"), quantize="int4")
