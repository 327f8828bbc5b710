"""Parameters where the table says, and constraints that are really in the program."""

import dataclasses
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from saisa_jax import parallel
from saisa_jax.config import ConfigError, MeshConfig, ModelConfig, VisionConfig
from saisa_jax.models.encoders.convnext import ConvNext
from saisa_jax.models.layers import NamedAxes, constrain, look_up
from saisa_jax.models.saisa import Saisa, abstract_params, init_params
from saisa_jax.planning.topologies import devices, parse
from saisa_jax.planning.traffic import traffic
from saisa_jax.testing.batches import make_batch
from saisa_jax.testing.configs import tiny_config
from saisa_jax.training.optimizer import flatten
from saisa_jax.training.state import param_shardings

pytestmark = pytest.mark.multi_device


def with_convnext(config: ModelConfig) -> ModelConfig:
    """The same model behind another encoder."""
    fields = {"depths": (1, 2), "widths": (16, 32), "num_layers": 2, "embed_dim": 32, "image_size": 32, "patch_size": 8}
    off = {"class_token": False, "pre_norm": False}
    vision = VisionConfig(kind="convnext", layer_scale=True, select_layer=-1, **fields, **off)
    return dataclasses.replace(config, vision=vision)


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


def test_kv_heads_that_do_not_divide_are_replicated_and_query_heads_are_an_error(caplog):
    config = tiny_config().model  # 4 query heads, 2 key/value heads, 2 vision heads
    mesh = parallel.make_mesh(MeshConfig(2, 1, 4))
    four_vision_heads = dataclasses.replace(config, vision=dataclasses.replace(config.vision, num_heads=4))
    with caplog.at_level("INFO", logger="absl"):
        rules = parallel.make_rules(four_vision_heads, mesh)
    assert "2 key/value heads do not divide by mesh.tensor=4: replicated" in caplog.text
    specs = flatten(param_shardings(four_vision_heads, mesh, rules))
    assert specs["layers/attn/k_proj/kernel"].spec == P(None, "fsdp", None, None)
    assert specs["layers/attn/q_proj/kernel"].spec == P(None, "fsdp", "tensor", None)
    with pytest.raises(ConfigError, match=r"model.vision.num_heads=2 does not divide by mesh.tensor=4"):
        parallel.make_rules(config, mesh)
    with pytest.raises(ConfigError, match=r"model.num_heads=4 does not divide by mesh.tensor=8"):
        parallel.make_rules(config, parallel.make_mesh(MeshConfig(1, 1, 8)))


def test_parameters_whose_axes_are_unknown_or_collide_are_an_error():
    mesh = parallel.make_mesh(MeshConfig(2, 2, 2))
    shape = jax.ShapeDtypeStruct((8, 8), np.float32)
    good = NamedAxes(shape, ("embed", "mlp"))
    assert parallel.shardings_of({"a": {"kernel": good}}, mesh, parallel.RULES)["a"]["kernel"].spec == P(
        "fsdp", "tensor"
    )
    for axes, said in (
        (("embed", "mlpp"), r"and mlpp is not in the table of parallel.py: vocab, embed, mlp"),
        (("embed", "vision_embed"), r"over mesh.fsdp more than once: embed -> fsdp, vision_embed -> fsdp"),
        (("mlp", "mlp"), r"over mesh.tensor more than once"),
    ):
        boxed = {"a": {"kernel": good}, "b": {"kernel": NamedAxes(shape, axes)}}
        with pytest.raises(ConfigError, match=rf"b/kernel has the logical axes \('{axes[0]}', '{axes[1]}'\).*{said}"):
            parallel.shardings_of(boxed, mesh, parallel.RULES)
    with pytest.raises(ConfigError, match=r"a/kernel has no logical axes"):
        parallel.shardings_of({"a": {"kernel": shape}}, mesh, parallel.RULES)


def test_a_vocabulary_of_129_is_padded_and_split():
    config = dataclasses.replace(tiny_config().model, vocab_size=129, num_heads=8)
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, num_heads=8))
    mesh = parallel.make_mesh(MeshConfig(1, 1, 8))
    wheres = flatten(param_shardings(config, mesh, parallel.make_rules(config, mesh)))
    assert wheres["embed_tokens/embedding"].shard_shape((256, 32)) == (32, 32)
    assert wheres["lm_head/kernel"].shard_shape((32, 256)) == (32, 32)


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


# --- What is said of activations -------------------------------------------------------------------------------------

ROWS, WHOLE, SPLIT = '{"data", "fsdp"}', "{}", '{"tensor"}'


def constraints_in(program: str) -> set[tuple[str, str]]:
    """(shape, sharding) of every constraint in a lowered program."""
    found = re.findall(r"sdy.sharding_constraint \S+ <@mesh, \[(.*)\]> : tensor<(\S+)x\w+>", program)
    return {(shape, sharding) for sharding, shape in found}


def lowered(config: ModelConfig) -> str:
    """The forward pass over eight rows of three tokens and an image of sixteen."""
    batch = make_batch(config, [[1, 2, 3]] * 8, max_images=1)
    apply = lambda p, b: Saisa(config).apply({"params": p}, b)[0]  # noqa: E731
    return jax.jit(apply).lower(abstract_params(config), batch).as_text()


@pytest.mark.parametrize("alignment", ["saisa", "naavit", "llava"])
def test_constraints_are_in_the_lowered_program(alignment):
    config = tiny_config(alignment).model
    mesh = parallel.make_mesh(MeshConfig(2, 2, 2))
    rules = parallel.make_rules(config, mesh)
    asks = 16 + 3 if alignment == "llava" else 3
    expected = {
        "encoder's residual stream": ("8x17x32", ROWS, WHOLE, WHOLE),
        "tokens to look up": ("8x3", '{"data"}', WHOLE),
        "columns that were looked up": ("8x3x32", '{"data"}', WHOLE, '{"fsdp"}'),
        "embeddings": ("8x3x32", ROWS, WHOLE, WHOLE),
        "features, and their projections": ("8x16x32", ROWS, WHOLE, WHOLE),
        "projector's hidden layer": ("8x16x32", ROWS, WHOLE, SPLIT),
        "queries": (f"8x{asks}x4x8", ROWS, WHOLE, SPLIT, WHOLE),
        "keys and values": (f"8x2x{asks}x8", ROWS, SPLIT, WHOLE, WHOLE),
        "MLP's hidden layer": (f"8x{asks}x64", ROWS, WHOLE, SPLIT),
        "residual stream": (f"8x{asks}x32", ROWS, WHOLE, WHOLE),
        "logits": ("8x3x128", ROWS, WHOLE, SPLIT),
    }
    if alignment != "llava":
        expected["keys and values of the image"] = ("8x2x16x8", ROWS, SPLIT, WHOLE, WHOLE)
        expected["k_proj and v_proj, whole for both streams"] = ("32x2x8", WHOLE, SPLIT, WHOLE)
    if alignment == "naavit":
        expected["MLP's hidden layer of the image"] = ("8x16x64", ROWS, WHOLE, SPLIT)
    with parallel.use(mesh, rules):
        program = lowered(config)
    assert constraints_in(program) == {(shape, ", ".join(axes)) for shape, *axes in expected.values()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_there_are_none_under_a_mesh_that_is_not_set():
    config = tiny_config().model
    mesh = parallel.make_mesh(MeshConfig(2, 2, 2))
    with mesh, nn.logical_axis_rules(parallel.make_rules(config, mesh)):
        assert "sharding_constraint" not in lowered(config)


def test_activations_whose_names_are_unknown_or_collide_are_an_error():
    mesh = parallel.make_mesh(MeshConfig(2, 2, 2))
    x = jnp.zeros((8, 8))
    with parallel.use(mesh, parallel.RULES):
        assert jax.jit(lambda x: constrain(x, "activation_batch", "activation_heads"))(x).sharding.spec[1] == "tensor"
        for names in (("activation_batch", "activation_head"), ("activation_heads", "activation_mlp")):
            with pytest.raises(ValueError, match=f"{names[1]}.* did not match a rule"):
                constrain(x, *names)


def test_the_sources_name_what_the_table_knows_and_all_of_it():
    sources = {path: path.read_text() for path in Path(parallel.__file__).parent.rglob("*.py")}
    assert [path.name for path, text in sources.items() if "with_logical_constraint" in text] == ["layers.py"]
    del sources[Path(parallel.__file__)]
    names = {name for text in sources.values() for name in re.findall(r'"(activation_\w+)"', text)}
    assert names == {name for name, _ in parallel.RULES if name.startswith("activation_")}
    assert len(dict(parallel.RULES)) == len(parallel.RULES)


# --- The table of tokens ---------------------------------------------------------------------------------------------


def looked_up_at_once(table: nn.Embed, tokens):
    """What `look_up` is there to avoid."""
    return constrain(table(tokens), "activation_batch", "activation_length", "activation_embed")


def compiled(look_up, mesh, table, tokens, dtype=None):
    """(table, tokens) -> (sum of cubes of what is looked up, its gradient), compiled; and where its arguments live."""
    placed = NamedSharding(mesh, P("tensor", "fsdp")), parallel.batch_sharding(mesh)

    def loss(values, tokens):
        embed = nn.Embed(*table.shape, dtype=dtype).bind({"params": {"embedding": values}})
        return (look_up(embed, tokens).astype(jnp.float32) ** 3).sum()

    with parallel.use(mesh, parallel.RULES):
        step = jax.jit(jax.value_and_grad(loss), in_shardings=placed, out_shardings=(None, placed[0]))
        return step.lower(table, tokens).compile(), placed


def received(program) -> float:
    """Bytes that a device receives."""
    return sum(kind.bytes for kind in traffic(program.as_text(), 8).values())


def test_a_table_split_twice_is_looked_up_where_it_is(capfd):
    """In the proportions of a 7B model: a group of devices has fewer tokens than the vocabulary."""
    mesh = parallel.make_mesh(MeshConfig(2, 2, 2))
    table = np.random.default_rng(0).normal(size=(512, 64)).astype(np.float32)
    tokens = np.random.default_rng(1).integers(0, 512, (8, 32), dtype=np.int32)
    at_once, _ = compiled(looked_up_at_once, mesh, table, tokens)
    by_itself = jax.__version_info__ >= (0, 12)  # its partitioner has learnt it
    assert by_itself or "full rematerialization" in capfd.readouterr().err
    ours, placed = compiled(look_up, mesh, table, tokens)
    assert "full rematerialization" not in capfd.readouterr().err
    assert received(ours) < received(at_once) * (1 if by_itself else 0.5)
    # Neither the table nor what is looked up is whole on any device.
    assert not re.search(r"f32\[(512|8,32),", ours.as_text())

    value, gradient = ours(*map(jax.device_put, (table, tokens), placed))
    expected = np.zeros_like(table)
    np.add.at(expected, tokens, 3 * table[tokens] ** 2)
    np.testing.assert_allclose(value, (table[tokens] ** 3).sum(), rtol=1e-4)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


@pytest.mark.aot
@pytest.mark.parametrize(("sizes", "share"), [((2, 2, 2), 0.7), ((1, 4, 2), 1.0), ((1, 8, 1), 1.0)])
@pytest.mark.parametrize("rows", [2, 12])
def test_at_7b_a_tpu_receives_no_more_for_it(sizes, share, rows):
    mesh = parallel.make_mesh(MeshConfig(*sizes), devices(parse("v5e:2x4")))
    table = jax.ShapeDtypeStruct((32000, 4096), jnp.float32)
    tokens = jax.ShapeDtypeStruct((rows * sizes[0] * sizes[1], 1024), jnp.int32)
    at_once, ours = (compiled(f, mesh, table, tokens, jnp.bfloat16)[0] for f in (looked_up_at_once, look_up))
    assert received(ours) <= 1.001 * share * received(at_once)


# --- Encoders --------------------------------------------------------------------------------------------------------


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
