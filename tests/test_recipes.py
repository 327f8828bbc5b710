"""The recipes of `configs/`: the paper's numbers, and models of known sizes; only shapes are made."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import jax
import pytest

from saisa_jax.config import Config, ConfigError, from_config_dict
from saisa_jax.data.text.templates import find_template
from saisa_jax.models.saisa import abstract_params
from saisa_jax.training.optimizer import split

ROOT = Path(__file__).parents[1]
# No recipe, or none of the paper's.
OTHERS = {"__init__", "common", "demo", "imported", "finetune_lora", "distill_from_llava", "proof"}
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in OTHERS)

VICUNA_7B, VICUNA_13B, LLAMA3_8B, MISTRAL_7B = 6_738_415_616, 13_015_864_320, 8_030_261_248, 7_241_732_096
QWEN3_8B, LLAMA32_3B, SMOLLM3_3B = 8_190_735_360, 3_212_749_824, 3_075_098_624


def but_the_last_layer(published: int, width: int, mlp: int) -> int:
    """A ViT of so many parameters without its last layer and its last norm, which nothing reads."""
    return published - (4 * (width**2 + width) + 2 * width * mlp + mlp + width + 4 * width) - 2 * width


CLIP = but_the_last_layer(303_507_456, 1024, 4096)
SIGLIP = but_the_last_layer(428_225_600 - 15_238_352, 1152, 4304)  # without its pooling head
DINOV2 = but_the_last_layer(304_372_736 - 1024, 1024, 4096) - 2 * 1024  # without mask token and that layer's scales
CONVNEXT = 348_143_872


def projector(vision: int, embed: int) -> int:
    return vision * embed + embed + embed * embed + embed


ONE = projector(1024, 4096)
# Two layers of attention, MLP and three norms; queries; the last norm and the map to the decoder.
RESAMPLER = 2 * (4 * (1024**2 + 1024) + 8 * 1024**2 + 5 * 1024 + 6 * 1024) + 64 * 1024 + 2 * 1024 + 1025 * 4096
CROSSED = 8 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096 + 2)  # cross layers: 1.62 billion
DECODERS = {
    "saisa_vicuna_13b": VICUNA_13B,
    "vica_vicuna_13b": VICUNA_13B,
    "saisa_llama3_8b": LLAMA3_8B,
    "saisa_mistral_7b": MISTRAL_7B,
    "saisa_qwen3_8b": QWEN3_8B,
    "saisa_llama3_2_3b": LLAMA32_3B,
    "saisa_smollm3_3b": SMOLLM3_3B,
}
FINETUNE = {  # parameters in stage 2: (trainable, frozen)
    "saisa_vicuna_7b": (VICUNA_7B + 32 * ONE, CLIP),
    "saisa_vicuna_13b": (VICUNA_13B + 40 * projector(1024, 5120), CLIP),
    "saisa_llama3_8b": (LLAMA3_8B + 32 * ONE, CLIP),
    "saisa_mistral_7b": (MISTRAL_7B + 32 * ONE, CLIP),
    "saisa_qwen3_8b": (QWEN3_8B + 36 * ONE, CLIP),
    "saisa_llama3_2_3b": (LLAMA32_3B + 28 * projector(1152, 3072), SIGLIP),
    "saisa_smollm3_3b": (SMOLLM3_3B + 36 * projector(1152, 2048), SIGLIP),
    "saisa_vicuna_7b_siglip": (VICUNA_7B + 32 * projector(1152, 4096), SIGLIP),
    "saisa_vicuna_7b_dinov2": (VICUNA_7B + 32 * ONE, DINOV2),
    "saisa_vicuna_7b_convnext": (VICUNA_7B + 32 * projector(2048, 4096), CONVNEXT),
    "ablation_shared_projector": (VICUNA_7B + ONE, CLIP),
    "ablation_half_the_layers": (VICUNA_7B + 16 * ONE, CLIP),
    "saisa_vicuna_7b_low_rank": (VICUNA_7B + ONE + 32 * 2 * 128 * 4096, CLIP),
    "vica_vicuna_7b": (VICUNA_7B + ONE, CLIP),
    "vica_vicuna_13b": (VICUNA_13B + projector(1024, 5120), CLIP),
    "ablation_resampler": (VICUNA_7B + 32 * RESAMPLER, CLIP),
    "flamingo_vicuna_7b": (VICUNA_7B + ONE + CROSSED, CLIP),
    "llava_vicuna_7b": (VICUNA_7B + ONE, CLIP),
    "naavit_vicuna_7b": (VICUNA_7B + ONE, CLIP),
}


def load(name: str, *argument: str) -> Config:
    return from_config_dict(Config, importlib.import_module(f"configs.{name}").get_config(*argument))


def count(tree: object) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_every_recipe_is_listed_here() -> None:
    assert sorted(FINETUNE) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_the_papers_numbers_and_the_known_number_of_parameters(name: str) -> None:
    config = load(name)
    sizes = {}
    for stage in config.stages:
        params = abstract_params(config.model_for(stage))
        parts = jax.eval_shape(lambda params, stage=stage: split(params, config.stage(stage).groups), params)
        sizes[stage] = tuple(map(count, parts))
        find_template(config.stage(stage).template)
    assert sizes["finetune"] == FINETUNE[name]
    one = RESAMPLER if "resampler" in name else projector(config.model.vision.embed_dim, config.model.embed_dim)
    one += CROSSED if "flamingo" in name else 0
    assert sizes["pretrain"] == (one, DECODERS.get(name, VICUNA_7B) + FINETUNE[name][1])

    assert config.stages == ("pretrain", "finetune")
    rates = [1e-4 if "flamingo" in name else 1e-3, 2e-5]
    assert [config.stage(stage).optimizer.lr for stage in config.stages] == rates
    for stage in config.stages:
        optimizer = config.stage(stage).optimizer
        assert (optimizer.schedule, optimizer.warmup_fraction, optimizer.weight_decay) == ("cosine", 0.03, 0.0)
        assert (optimizer.b1, optimizer.b2, optimizer.clip_norm) == (0.9, 0.999, 1.0)
        assert (config.stage(stage).epochs, config.stage(stage).steps) == (1.0, None)
    assert config.model.max_length == 2048
    assert config.name == name


@pytest.mark.parametrize("name", RECIPES)
def test_argument_and_docstring(name: str) -> None:
    assert load(name, "pretrain").stages == ("pretrain",)
    assert load(name, "finetune").stages == ("finetune",)
    with pytest.raises(ConfigError, match=f"configs/{name}.py:finetun is unknown; known: pretrain, finetune"):
        load(name, "finetun")
    words = (importlib.import_module(f"configs.{name}").__doc__ or "").split()
    start = load(name).init_from
    assert f"--config=configs/{name}.py" in words and f"--workdir=runs/{name}" in words and f"--to={start}" in words
    assert load(name).data.tokenizer == f"{start}/tokenizer"
