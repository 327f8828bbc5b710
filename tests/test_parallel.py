"""Sharded == unsharded, parameters where the table says, and constraints that are really in the program."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from saisa_jax import parallel
from saisa_jax.config import TRAIN_ALL, ConfigError, MeshConfig, ModelConfig, OptimizerConfig, VisionConfig
from saisa_jax.models.convnext import ConvNext
from saisa_jax.models.saisa import Saisa, abstract_params, init_params
from saisa_jax.testing.batches import make_batch, random_layout
from saisa_jax.testing.configs import tiny_config
from saisa_jax.training.optimizer import flatten, make_optimizer
from saisa_jax.training.state import create_state, param_shardings, state_shardings
from saisa_jax.training.step import make_train_step

pytestmark = pytest.mark.multi_device


def with_convnext(config: ModelConfig) -> ModelConfig:
    """The same model behind another encoder."""
    fields = {"depths": (1, 2), "widths": (16, 32), "num_layers": 2, "embed_dim": 32, "image_size": 32, "patch_size": 8}
    off = {"class_token": False, "pre_norm": False}
    vision = VisionConfig(kind="convnext", layer_scale=True, select_layer=-1, **fields, **off)
    return dataclasses.replace(config, vision=vision)


def train(alignment: str, sizes: tuple[int, int, int], steps: int = 3):
    """Losses and final parameters on a mesh of the given sizes."""
    config = tiny_config(alignment).model
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = parallel.make_mesh(MeshConfig(*sizes), devices)
    rules = parallel.make_rules(config, mesh)
    params = init_params(config, jax.random.key(0))
    # Some true gradients are 0 (biases of keys); a large eps keeps Adam from making steps of their rounding.
    settings = OptimizerConfig(lr=1e-2, warmup_fraction=0.0, eps=1e-3)
    optimizer = make_optimizer(settings, TRAIN_ALL, params, steps)
    rng = np.random.default_rng(0)
    batch = make_batch(config, [random_layout(rng, 9 - i % 3, i % 3, 100) for i in range(8)], max_images=2)
    shardings = state_shardings(config, TRAIN_ALL, optimizer, mesh, rules)
    losses = []
    with parallel.use(mesh, rules):
        state = create_state(lambda params: params, jax.tree.map(np.asarray, params), TRAIN_ALL, optimizer, shardings)
        step = make_train_step(config, optimizer, shardings)
        for _ in range(steps):
            state, metrics = step(state, parallel.to_device(batch, mesh))
            losses.append(float(metrics["loss"]))
    return losses, jax.tree.map(np.asarray, flatten(state.trainable)), state, shardings


@pytest.mark.parametrize("alignment", ["saisa", "naavit", "llava"])
def test_sharded_is_unsharded(alignment):
    losses, params, _, _ = train(alignment, (1, 1, 1))
    sizes = [(2, 2, 2), (1, 8, 1)] if alignment == "saisa" else [(2, 2, 2)]
    for size in sizes:
        other_losses, other, state, shardings = train(alignment, size)
        np.testing.assert_allclose(other_losses, losses, atol=1e-5)
        for path, leaf in params.items():
            np.testing.assert_allclose(other[path], leaf, atol=1e-5, err_msg=f"{path} {size}")
        placed = jax.tree.map(lambda leaf, want: leaf.sharding.is_equivalent_to(want, leaf.ndim), state, shardings)
        assert all(jax.tree.leaves(placed))
        moments = flatten(state.opt_state[1].mu)
        assert moments["lm_head/kernel"].sharding.spec == flatten(state.trainable)["lm_head/kernel"].sharding.spec


def test_parameters_live_where_the_table_says():
    config = tiny_config().model
    mesh = parallel.make_mesh(MeshConfig(2, 2, 2))
    specs = {p: s.spec for p, s in flatten(param_shardings(config, mesh, parallel.make_rules(config, mesh))).items()}
    assert specs["layers/attn/q_proj/kernel"] == P(None, "fsdp", "tensor", None)
    assert specs["layers/attn/k_proj/kernel"] == P(None, "fsdp", "tensor", None)
    assert specs["layers/visual_proj/fc1/kernel"] == P(None, "fsdp", "tensor")
    assert specs["layers/visual_proj/fc2/kernel"] == P(None, "tensor", "fsdp")
    assert specs["vision/layers/mlp/fc1/kernel"] == P(None, "fsdp", "tensor")
    assert specs["final_norm/scale"] == P(None)


def test_kv_heads_that_do_not_divide_are_replicated_and_query_heads_are_an_error():
    config = tiny_config().model  # 4 query heads, 2 key/value heads, 2 vision heads
    mesh = parallel.make_mesh(MeshConfig(2, 1, 4))
    four_vision_heads = dataclasses.replace(config, vision=dataclasses.replace(config.vision, num_heads=4))
    specs = flatten(param_shardings(four_vision_heads, mesh, parallel.make_rules(four_vision_heads, mesh)))
    assert specs["layers/attn/k_proj/kernel"].spec == P(None, "fsdp", None, None)
    assert specs["layers/attn/q_proj/kernel"].spec == P(None, "fsdp", "tensor", None)
    with pytest.raises(ConfigError, match=r"model.vision.num_heads=2 does not divide by mesh.tensor=4"):
        parallel.make_rules(config, mesh)
    with pytest.raises(ConfigError, match=r"model.num_heads=4 does not divide by mesh.tensor=8"):
        parallel.make_rules(config, parallel.make_mesh(MeshConfig(1, 1, 8)))


def test_gradients_of_a_sharded_convnext_are_those_of_an_unsharded_one():
    config = with_convnext(tiny_config().model)
    encoder = ConvNext(config.vision)
    params = init_params(config, jax.random.key(0))["vision"]
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    loss = lambda params, images: (encoder.apply({"params": params}, images)[0] ** 2).mean()  # noqa: E731
    expected = flatten(jax.jit(jax.grad(loss))(params, images))
    mesh = parallel.make_mesh(MeshConfig(2, 2, 2))
    rules = parallel.make_rules(config, mesh)
    with parallel.use(mesh, rules):
        params = jax.tree.map(jax.device_put, params, param_shardings(config, mesh, rules)["vision"])
        gradients = flatten(jax.jit(jax.grad(loss))(params, parallel.to_device(images, mesh)))
    for path, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[path], atol=1e-5, err_msg=path)


def test_widths_of_a_convnext_that_do_not_divide_are_an_error():
    config = with_convnext(tiny_config().model)
    odd = dataclasses.replace(config, vision=dataclasses.replace(config.vision, widths=(18, 32)))
    with pytest.raises(ConfigError, match=r"model.vision.widths=18 does not divide by mesh.fsdp=4"):
        parallel.make_rules(odd, parallel.make_mesh(MeshConfig(2, 4, 1)))


def test_a_mesh_that_does_not_fit_is_an_error():
    assert parallel.make_mesh(MeshConfig(-1, 2, 2)).shape == {"data": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(ConfigError, match=r"needs 3 devices, and there are 8; set --config.mesh"):
        parallel.make_mesh(MeshConfig(3, 1, 1))


def test_constraints_are_in_the_lowered_program():
    config = tiny_config().model
    mesh = parallel.make_mesh(MeshConfig(2, 2, 2))
    params = init_params(config, jax.random.key(0))
    batch = make_batch(config, [[1, 2, 3]] * 8, max_images=1)
    apply = lambda p, b: Saisa(config).apply({"params": p}, b)[0]  # noqa: E731
    with parallel.use(mesh, parallel.make_rules(config, mesh)):
        inside = jax.jit(apply).lower(params, batch).as_text()
    assert inside.count("sharding_constraint") > 5
    assert "sharding_constraint" not in jax.jit(apply).lower(params, batch).as_text()


@pytest.mark.parametrize("encoder", ["vit", "convnext"])
def test_each_device_encodes_its_own_images(encoder):
    """The weights are gathered; a sum over devices would mean that each holds a share of all images' channels."""
    config = tiny_config().model if encoder == "vit" else with_convnext(tiny_config().model)
    mesh = parallel.make_mesh(MeshConfig(1, 8, 1))
    rules = parallel.make_rules(config, mesh)
    placed = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    params = jax.tree.map(placed, abstract_params(config), param_shardings(config, mesh, rules))
    images = jax.ShapeDtypeStruct((8, 2, 32, 32, 3), np.uint8, sharding=parallel.batch_sharding(mesh))
    encode = lambda params, images: Saisa(config).apply({"params": params}, images, method=Saisa.encode_images)  # noqa: E731
    with parallel.use(mesh, rules):
        program = jax.jit(encode).lower(params, images).compile().as_text()
    assert "all-gather(" in program
    assert "all-reduce(" not in program and "reduce-scatter(" not in program
