"""Our configurations in Hugging Face's spelling, and back: the same."""

import dataclasses

import pytest

from saisa_jax import presets
from saisa_jax.convert.configs import (
    config_from_hf,
    decoder_config_from_hf,
    decoder_to_hf,
    preprocessor_to_hf,
    vision_config_from_hf,
    vision_to_hf,
)
from saisa_jax.convert.layouts import check_says
from saisa_jax.convert.rows import ConvertError


@pytest.mark.parametrize("name", presets.VISIONS)
def test_every_encoder_there_and_back(name, tmp_path):
    vision = presets.VISIONS[name]
    raw = vision_to_hf(vision)
    back = vision_config_from_hf(raw, tmp_path, vision.select_layer, vision.image_mode)
    pixels = preprocessor_to_hf(vision)
    back = dataclasses.replace(back, image_mean=tuple(pixels["image_mean"]), image_std=tuple(pixels["image_std"]))
    assert dataclasses.replace(back, post_norm=vision.post_norm) == vision


@pytest.mark.parametrize("name", presets.LLMS)
def test_every_decoder_there_and_back(name, tmp_path):
    model = presets.make(name, next(iter(presets.VISIONS)))
    back = decoder_config_from_hf(decoder_to_hf(model), tmp_path, vision=model.vision)
    kept = {"dtype": model.dtype, "param_dtype": model.param_dtype, "projector": model.projector}
    assert dataclasses.replace(back, **kept) == model


def test_registers_are_no_patches_of_a_llava(tmp_path):
    tower = {"model_type": "dinov2_with_registers", "num_register_tokens": 4}
    with pytest.raises(ConvertError, match="its tower has 4 registers"):
        config_from_hf(tmp_path, layout="llava-hf", raw={"model_type": "llava", "vision_config": tower})
    with pytest.raises(ConvertError, match="'dinov2_with_registers' is none that transformers' LLaVA can have"):
        check_says(presets.make("vicuna-7b", "dinov2-with-registers-base", "llava"), "llava-hf")


def test_llava_hf_knows_no_convnext():
    model = presets.make("vicuna-7b", "convnext-xlarge-384", "llava")
    with pytest.raises(ConvertError, match="'convnext' is none that transformers' LLaVA can have"):
        check_says(model, "llava-hf")
