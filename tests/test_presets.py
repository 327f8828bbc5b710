"""Presets have the published parameter counts; only shapes are made."""

from __future__ import annotations

import dataclasses
import math
import resource

import jax
import pytest

from saisa_jax import presets
from saisa_jax.config import ConfigError, ModelConfig, ProjectorConfig
from saisa_jax.models.saisa import abstract_params

DECODERS = {
    "vicuna-7b": 6_738_415_616,
    "vicuna-13b": 13_015_864_320,
    "llama3-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,  # tied
    "llama3.2-3b": 3_212_749_824,  # tied
    "smollm3-3b": 3_075_098_624,  # tied
    "mistral-7b": 7_241_732_096,
    "smollm2-135m": 134_515_008,  # tied
    "qwen2-0.5b": 494_032_768,  # tied
    "qwen3-0.6b": 596_049_920,  # tied
    "qwen3-1.7b": 1_720_574_976,  # tied
    "qwen3-4b": 4_022_468_096,  # tied
    "qwen3-8b": 8_190_735_360,
}
# Whole encoders: every layer and the last norm (without SigLIP's pooling head).
ENCODERS = {
    "clip-vit-l-336": 303_507_456,
    "siglip-so400m-384": 428_225_600 - 15_238_352,
    "siglip2-base-256": 92_930_304 - 7_087_104,
    "siglip2-so400m-384": 428_225_600 - 15_238_352,
    "siglip2-so400m-512": 428_772_800 - 15_238_352,
    "dinov2-small": 22_056_576 - 384,  # without the mask token of its pre-training
    "dinov2-with-registers-base": 86_583_552 - 768,
    "dinov2-with-registers-large": 304_372_736 - 1024,
    "convnext-xlarge-384": 350_196_968 - 2_049_000 - 4096,  # without classifier and the norm before it
}
PROJECTOR_7B = 20_979_712


def count(tree: object) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def decoder_of(params: dict) -> int:
    """Parameters of the language model alone."""
    layers = {name: value for name, value in params["layers"].items() if name != "visual_proj"}
    rest = {name: value for name, value in params.items() if name not in ("vision", "visual_proj", "layers")}
    return count(layers) + count(rest)


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_has_the_published_number_of_parameters(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    params = abstract_params(presets.make(name, "clip-vit-l-336"))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert decoder_of(params) == DECODERS[name]
    assert ("lm_head" in params) != presets.LLMS[name].get("tie_embeddings", False)
    assert grown < 300 * 1024, "shapes should take no memory"


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_has_the_published_number_of_parameters(name: str) -> None:
    vision = presets.VISIONS[name]
    whole = dataclasses.replace(vision, select_layer=-1, post_norm=vision.kind == "vit")
    assert count(abstract_params(presets.make("smollm2-135m", whole))["vision"]) == ENCODERS[name]


def test_only_the_layers_that_are_used_exist() -> None:
    vision = presets.VISIONS["clip-vit-l-336"]
    c, mlp = vision.embed_dim, vision.mlp_dim
    last_layer = 4 * (c * c + c) + 2 * c * mlp + mlp + c + 4 * c
    used = count(abstract_params(presets.make("smollm2-135m", vision))["vision"])
    assert used == ENCODERS["clip-vit-l-336"] - last_layer - 2 * c  # its last norm goes as well


def test_projectors_one_or_one_for_each_layer() -> None:
    many = abstract_params(presets.make("vicuna-7b", "clip-vit-l-336"))
    assert "visual_proj" not in many
    assert count(many["layers"]["visual_proj"]) == 32 * PROJECTOR_7B == 671_350_784
    for config in (
        presets.make("vicuna-7b", "clip-vit-l-336", "llava"),
        presets.make("vicuna-7b", "clip-vit-l-336", "naavit"),
        presets.make("vicuna-7b", "clip-vit-l-336", "saisa", projector=ProjectorConfig(sharing="shared")),
    ):
        one = abstract_params(config)
        assert "visual_proj" not in one["layers"]
        assert count(one["visual_proj"]) == PROJECTOR_7B


def test_patches_and_windows() -> None:
    assert {name: vision.num_patches for name, vision in presets.VISIONS.items()} == {
        "clip-vit-l-336": 576,
        "siglip-so400m-384": 729,
        "siglip2-base-256": 256,
        "siglip2-so400m-384": 729,
        "siglip2-so400m-512": 1024,
        "dinov2-small": 1369,
        "dinov2-with-registers-base": 1369,
        "dinov2-with-registers-large": 1369,
        "convnext-xlarge-384": 144,
    }
    windows = {name: presets.make(name, "clip-vit-l-336").sliding_window for name in presets.LLMS}
    assert {name: window for name, window in windows.items() if window} == {"mistral-7b": 4096}


def test_overrides_win() -> None:
    small = dataclasses.replace(presets.VISIONS["dinov2-small"], image_size=224)
    config = presets.make("smollm2-135m", small, visual_layers=(3, 7), max_length=512, dtype="float32")
    assert isinstance(config, ModelConfig)
    assert (config.visual_layers, config.max_length, config.vision.num_patches) == ((3, 7), 512, 256)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vicuna-7", "clip-vit-l-336"), "unknown LLM preset 'vicuna-7'; did you mean vicuna-7b"),
        (("vicuna-7b", "clip-vit-l"), "unknown vision preset 'clip-vit-l'; did you mean clip-vit-l-336"),
        (("zzz", "clip-vit-l-336"), "known: vicuna-7b, vicuna-13b"),
        (("vicuna-7b", "clip-vit-l-336", "lava"), "did you mean llava"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        presets.make(*arguments)


def test_an_unknown_field_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'visual_layer'.*did you mean visual_layers"):
        presets.make("vicuna-7b", "clip-vit-l-336", visual_layer=(1,))
