"""Steps of an epoch, and memory by arithmetic."""

from __future__ import annotations

import dataclasses
import importlib

import jax
import pytest

from saisa_jax.config import Config, ConfigError, MeshConfig, from_config_dict
from saisa_jax.planning import remedies
from saisa_jax.planning.lengths import length
from saisa_jax.planning.stage import as_llava
from saisa_jax.planning.topologies import parse
from saisa_jax.testing.configs import tiny_config
from saisa_jax.training.memory import device_bytes
from saisa_jax.training.setup import setup_stage


@pytest.fixture(scope="module")
def recipe() -> Config:
    return from_config_dict(Config, importlib.import_module("configs.saisa_vicuna_7b").get_config())


def test_the_recipes_steps_hold_as_many_samples_as_the_papers(recipe: Config) -> None:
    """256 and 128 samples a step, 2,180 and 5,200 steps an epoch."""
    pretrain, finetune = (
        length(recipe.stage(stage), recipe.data.packing, recipe.model.vision) for stage in recipe.stages
    )
    assert pretrain.samples_per_step == pytest.approx(256, rel=0.07) and pretrain.steps == pytest.approx(2180, rel=0.07)
    assert finetune.samples_per_step == pytest.approx(128, rel=0.07) and finetune.steps == pytest.approx(5200, rel=0.07)


def test_samples_that_are_given(recipe: Config) -> None:
    assert length(recipe.finetune, True, recipe.model.vision, samples=4800, per_row=2.0).steps == 4800 / (
        2 * recipe.finetune.batch_size
    )
    unpacked = length(recipe.finetune, False, recipe.model.vision)
    assert unpacked.samples_per_step == recipe.finetune.batch_size
    tiny = tiny_config().finetune
    assert length(tiny, False, recipe.model.vision).steps == tiny.steps
    with pytest.raises(ConfigError, match="easy_vqa:vqa hold: set --samples"):
        length(dataclasses.replace(tiny, steps=None), False, recipe.model.vision)


def test_bytes_of_a_split_state() -> None:
    config = dataclasses.replace(tiny_config(), mesh=MeshConfig(data=1, fsdp=1, tensor=1))
    one = device_bytes(setup_stage(config, "finetune", 10, jax.devices()[:1]).abstract_state())
    over_8 = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=8))
    split = device_bytes(setup_stage(over_8, "finetune", 10).abstract_state())
    assert one / 8 < split < one / 4  # norms and biases are whole everywhere


def test_remedies_come_in_order_and_say_only_what_changes(recipe: Config) -> None:
    tpu, gpu = parse("v5e:4x4"), parse("h100:8")
    none = dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, remat_policy="none", attention_impl="xla")
    )
    lines = [str(remedy) for remedy in remedies.candidates(none, "finetune", tpu)]
    first = "--config.model.remat_policy=full --config.model.attention_impl=flash"
    assert lines[:2] == [first, f"{first} --config.finetune.accumulation=2"]
    assert str(next(remedies.candidates(none, "finetune", gpu))) == first.replace("flash", "cudnn")
    assert str(next(remedies.candidates(recipe, "finetune", tpu))) == "--config.model.remat_policy=full"
    full = dataclasses.replace(recipe.model, remat_policy="full", attention_impl="flash")
    flash = dataclasses.replace(recipe, model=full)
    only = next(remedies.candidates(flash, "finetune", tpu))
    assert str(only) == "--config.finetune.accumulation=2" and only.config.finetune.accumulation == 2
    *_, last = remedies.candidates(flash, "finetune", tpu)
    moment = "--config.finetune.optimizer.first_moment_dtype=bfloat16"
    assert str(last) == f"--config.finetune.accumulation=16 {moment}"
    replicated = dataclasses.replace(flash, mesh=MeshConfig(data=-1, fsdp=1))
    assert str(next(remedies.candidates(replicated, "finetune", tpu))) == "--config.mesh.data=1 --config.mesh.fsdp=-1"
    in_float32 = dataclasses.replace(none, model=dataclasses.replace(none.model, dtype="float32"))
    assert str(next(remedies.candidates(in_float32, "finetune", tpu))) == "--config.model.remat_policy=full"


def test_the_same_recipe_as_llava(recipe: Config) -> None:
    llava = as_llava(recipe)
    assert (llava.model.alignment, llava.finetune.sharing) == ("llava", "shared")
    assert llava.finetune.batch_size == recipe.finetune.batch_size
