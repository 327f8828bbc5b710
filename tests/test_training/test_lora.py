"""LoRA: who trains, what the merged model computes, and that nothing after training knows of it."""

import dataclasses
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from saisa_jax import flops, parallel
from saisa_jax.checkpoints import load_model, save_model
from saisa_jax.config import PROJECTIONS, TRAIN_ADAPTERS, Config, ConfigError, LoraConfig, MeshConfig, from_config_dict
from saisa_jax.convert.export_checkpoint import export_checkpoint
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.inference.model import load
from saisa_jax.models.lora import is_adapter, merge_adapters
from saisa_jax.models.saisa import Saisa, abstract_params, init_params
from saisa_jax.testing.batches import IMAGE, make_batch
from saisa_jax.testing.configs import tiny_config
from saisa_jax.training import loop
from saisa_jax.training.model_of_step import save_model_of_step
from saisa_jax.training.optimizer import flatten, merge
from saisa_jax.training.start import check_stages, starting_params

LORA = LoraConfig(rank=4, alpha=8.0)
TOKENIZER = load_tokenizer("easy_vqa")


TRAIN = TRAIN_ADAPTERS[0][1]


def config_of(start, **changes):
    config = tiny_config()
    finetune = dataclasses.replace(config.finetune, groups=TRAIN_ADAPTERS, lora=LORA, **changes)
    training = dataclasses.replace(config.training, eval_every=0)
    mesh = MeshConfig(2, 2, 2)
    return dataclasses.replace(
        config, stages=("finetune",), init_from=str(start), finetune=finetune, training=training, mesh=mesh
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(the model that training starts from, the stage's directory after three steps on 2 x 2 x 2 devices)."""
    where = epath.Path(tmp_path_factory.mktemp("lora"))
    config = tiny_config()
    params = jax.jit(init_params, static_argnums=0)(config.model, jax.random.key(3))
    save_model(where / "start", params, config, TOKENIZER, {"stage": "finetune"})
    assert loop.run(config_of(where / "start"), where / "run") == 0
    return where / "start", where / "run" / "finetune"


def params_in(directory):
    return {path: np.asarray(leaf.astype(jnp.float32)) for path, leaf in flatten(load_model(directory)[0]).items()}


def logits_of(model, params):
    batch = make_batch(model, [[5, IMAGE, 6, 7, 8], [9, 10, 11]])
    return jax.jit(lambda params: Saisa(model).apply({"params": params}, batch)[0])(params)


def test_adapters_and_projectors_train_and_nothing_else(run):
    start, directory = run
    before, after, adapter = (params_in(path) for path in (start, directory / "model", directory / "adapter"))
    assert before.keys() == after.keys()
    in_bfloat16 = lambda x: np.asarray(jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32))  # noqa: E731
    changed = {path for path in after if not np.array_equal(in_bfloat16(before[path]), after[path])}
    projector = {path for path in before if "visual_proj" in path}
    assert changed == projector | {f"{name}/kernel" for name in PROJECTIONS}
    assert set(adapter) == projector | {f"{name}/kernel_lora_{ab}" for name in PROJECTIONS for ab in "ab"}
    assert all(np.abs(leaf).max() > 0 for leaf in adapter.values())


def test_merged_is_unmerged(run):
    start, directory = run
    adapted = config_of(start).trained_model("finetune")
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), load_model(start)[0])
    unmerged = merge(base, load_model(directory / "adapter")[0])
    merged = load_model(directory / "model")[0]
    expected = logits_of(adapted, unmerged)
    np.testing.assert_allclose(logits_of(dataclasses.replace(adapted, lora=LoraConfig()), merged), expected, atol=1e-5)
    without = dataclasses.replace(adapted, lora=LoraConfig())
    assert float(jnp.abs(logits_of(without, base) - expected)[..., :100].max()) > 1e-3  # and it has learnt something


def test_a_run_starts_from_a_lora_run_where_it_left_off(run):
    _, directory = run
    config = config_of(directory / "model")
    mesh = parallel.make_mesh(config.mesh)
    rules = parallel.make_rules(config.model, mesh)
    start = starting_params(config, "finetune", epath.Path("/nowhere"), TOKENIZER, mesh, rules)
    params = jax.jit(start.make)(start.argument)
    plain = {path: leaf for path, leaf in flatten(params).items() if not is_adapter(path)}
    for path, leaf in params_in(directory / "model").items():
        np.testing.assert_array_equal(plain[path], leaf, err_msg=path)
    adapters = {path: np.asarray(leaf) for path, leaf in flatten(params).items() if is_adapter(path)}
    assert len(adapters) == 14
    for path, leaf in adapters.items():
        bound = 1 / np.sqrt(leaf.shape[1]) if path.endswith("_a") else 0
        assert bound * 0.8 <= np.abs(leaf).max() <= bound and (leaf.shape[1] == LORA.rank) == path.endswith("_b")
    # With B = 0 the adapted model computes what the plain one does.
    adapted = config.trained_model("finetune")
    got = logits_of(adapted, params)
    merged = merge_adapters(params, LORA)
    np.testing.assert_array_equal(got, logits_of(dataclasses.replace(adapted, lora=LoraConfig()), merged))


def test_a_model_of_a_step_is_the_runs_own(run, tmp_path):
    _, directory = run
    save_model_of_step(directory / "checkpoints" / "3", tmp_path / "three")
    exported, own = params_in(tmp_path / "three"), params_in(directory / "model")
    assert exported.keys() == own.keys()
    for path, leaf in own.items():  # merged on one device, and on eight
        np.testing.assert_allclose(exported[path], leaf, rtol=0, atol=1e-6, err_msg=path)
    answers = [
        load(path).generate(["what color is the shape?"], max_new_tokens=4)
        for path in (tmp_path / "three", directory / "model")
    ]
    assert answers[0] == answers[1]


def test_the_merged_model_is_exported_as_any_other(run, tmp_path):
    _, directory = run
    export_checkpoint(str(directory / "model"), "hf-llm", tmp_path / "out", dtype="float32")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    exported = load_file(file)["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(exported, params_in(directory / "model")["layers/mlp/up_proj/kernel"][1].T)


def test_the_recipe_starts_from_a_finished_model_with_llavas_settings(run, tmp_path):
    start, _ = run
    get_config = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "finetune_lora.py"))["get_config"]
    config = from_config_dict(Config, get_config(str(start)))
    assert config.init_from == str(start) and config.stages == ("finetune",)
    assert config.finetune.lora == LoraConfig(rank=128, alpha=256.0) and config.finetune.optimizer.lr == 2e-4
    assert [group.lr_scale for _, group in config.finetune.groups if not group.frozen] == [1.0, 0.1]
    check_stages(config, TOKENIZER, epath.Path(tmp_path))


def test_bfloat16_activations_stay_bfloat16():
    model = dataclasses.replace(tiny_config().model, lora=LORA, dtype="bfloat16")
    batch = make_batch(model, [[5, IMAGE, 6, 7, 8]])
    hidden = lambda params: Saisa(model).apply({"params": params}, batch, method=Saisa.hidden)[0]  # noqa: E731
    assert jax.eval_shape(hidden, abstract_params(model)).dtype == jnp.bfloat16
    # Held-out answers come from the unmerged model.
    prefill = lambda params: Saisa(model).apply({"params": params}, batch, 2, method=Saisa.prefill)[1]  # noqa: E731
    assert jax.eval_shape(prefill, abstract_params(model)).k.dtype == jnp.bfloat16


def test_what_cannot_run_is_an_error(monkeypatch, tmp_path):
    config = config_of("somewhere")
    training_all = dataclasses.replace(config, finetune=dataclasses.replace(config.finetune, groups=((".*", TRAIN),)))
    with pytest.raises(ConfigError, match=r"finetune.groups train layers/attn/k_proj/kernel, .*groups=TRAIN_ADAPTERS"):
        check_stages(training_all, TOKENIZER, epath.Path(tmp_path))
    with pytest.raises(ConfigError, match=r"lora.targets='q_proj' matches none of layers/attn/q_proj"):
        LoraConfig(targets="q_proj")
    with pytest.raises(ConfigError, match=r"model.lora belongs to a stage: set finetune.lora"):
        dataclasses.replace(config, model=dataclasses.replace(config.model, lora=LORA))
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ConfigError, match="LoRA needs qwix: pip install qwix"):
        abstract_params(config.trained_model("finetune"))


def test_flops_count_the_thin_products():
    model = config_of("somewhere").trained_model("finetune")
    plain = flops.layer(dataclasses.replace(model, lora=LoraConfig()), 16).parts
    thin = {part: value - plain[part] for part, value in flops.layer(model, 16).parts.items()}
    assert thin["mlp"] == 3 * 2 * 16 * LORA.rank * (model.embed_dim + model.mlp_dim)
    assert thin["q"] == 2 * 16 * LORA.rank * (model.embed_dim + 32) and thin["attention"] == 0
