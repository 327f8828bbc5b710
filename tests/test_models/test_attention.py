"""Attention: `xla` against a naive softmax, the kernels against `xla`, and what they refuse."""

import dataclasses
import functools
import importlib.util
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental import pallas as pl
from jax.experimental import topologies

from saisa_jax import parallel
from saisa_jax.config import ConfigError, MeshConfig
from saisa_jax.models import attention_tpu
from saisa_jax.models.attention import attend
from saisa_jax.models.mask import KeyBlock, PackedPositions, make_mask
from saisa_jax.models.saisa import Saisa, abstract_params
from saisa_jax.testing.batches import make_batch, random_layout
from saisa_jax.testing.configs import tiny_config

IMAGE = -1
PATCHES = 60  # of an image, here
TEXT, VISUAL = 200, 3 * PATCHES

# A row is a list of samples, a sample a list of runs of text (their lengths) and images.
ROWS = (
    [[5, IMAGE, 60], [IMAGE, 90, IMAGE, 20]],  # packed, several images
    [[TEXT]],  # text alone
    [],  # padding alone
    [[1, IMAGE, 40], [30], [2, IMAGE, 1], [7, IMAGE, 50]],
)


def places(rows=ROWS, text: int = TEXT, visual: int = VISUAL) -> tuple[PackedPositions, PackedPositions]:
    """Where the tokens of the rows stand: of text, of images."""
    arrays = np.zeros((4, len(rows), text + visual), np.int32)
    text_places, visual_places = arrays[:2, :, :text], arrays[2:, :, :visual]
    for row, samples in enumerate(rows):
        used = [0, 0]
        for segment, runs in enumerate(samples, start=1):
            position = 0
            for run in runs:
                kind, length = (1, PATCHES) if run == IMAGE else (0, run)
                target, where = (text_places, visual_places)[kind], slice(used[kind], used[kind] + length)
                target[0, row, where] = np.arange(position, position + length)
                target[1, row, where] = segment
                used[kind] += length
                position += length
    return PackedPositions(*jnp.array(text_places)), PackedPositions(*jnp.array(visual_places))


def random_blocks(dtype=jnp.float32, heads: int = 4, kv_heads: int = 2, head_dim: int = 64, window=None, rows=ROWS):
    """Queries [B, T, N, H], and the keys and values of the image and of the text."""
    rng = np.random.default_rng(0)
    text, visual = places(rows)
    normal = lambda *shape: jnp.asarray(rng.normal(size=(len(rows), *shape)), dtype)  # noqa: E731
    keys = lambda at: (normal(kv_heads, at.positions.shape[1], head_dim) for _ in range(2))  # noqa: E731
    blocks = [KeyBlock(*keys(at), make_mask(text, at, window)) for at in (visual, text)]
    return normal(TEXT, heads, head_dim), blocks


def output_and_gradients(q, blocks, impl):
    """What `attend` puts out, and the gradients of a sum over it for q, and k and v of every block."""

    def run(q, keys_values):
        given = [block._replace(k=k, v=v) for block, (k, v) in zip(blocks, keys_values, strict=True)]
        out = attend(q, given, impl)[0]
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    both = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))
    (_, out), gradients = both(q, [(block.k, block.v) for block in blocks])
    return out, gradients


def assert_same(actual, expected):
    (out, gradients), (expected_out, expected_gradients) = actual, expected
    np.testing.assert_allclose(out, expected_out, atol=1e-5)
    for gradient, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels run on the CPU, with tiles small enough that there are several of them."""
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(attention_tpu, "MAX_QUERIES", 128)
    monkeypatch.setattr(attention_tpu, "MAX_KEYS", 128)


# --- xla --------------------------------------------------------------------------------------------------------------


def _naive(q, k, v, mask):
    groups = q.shape[2] // k.shape[1]
    k, v = np.repeat(k, groups, axis=1), np.repeat(v, groups, axis=1)
    scores = np.einsum("btnh,bnsh->bnts", q, k) / np.sqrt(q.shape[-1])
    weights = np.where(mask[:, None], np.exp(scores - scores.max()), 0)
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    return np.einsum("bnts,bnsh->btnh", weights, v), weights


def test_blocks_are_one_softmax_and_a_query_without_a_key_gives_zero():
    rng = np.random.default_rng(1)
    q = rng.normal(size=(2, 5, 4, 8)).astype(np.float32)
    k, v = (rng.normal(size=(2, 2, 9, 8)).astype(np.float32) for _ in range(2))
    text = PackedPositions(jnp.arange(5) + jnp.zeros((2, 1), jnp.int32), jnp.array([[1, 1, 0, 2, 2], [1, 1, 1, 1, 1]]))
    both = PackedPositions(jnp.array(rng.integers(0, 6, (2, 9))), jnp.array(rng.integers(0, 3, (2, 9))))
    cut = lambda x, s: PackedPositions(*(part[:, s] for part in x))  # noqa: E731
    blocks = [KeyBlock(jnp.array(k[:, :, s]), jnp.array(v[:, :, s]), make_mask(text, cut(both, s))) for s in
              (slice(0, 4), slice(4, 9))]  # fmt: skip
    mask = np.array(make_mask(text, both).allowed)

    def loss(q):
        out, weights = attend(q, blocks)
        return jnp.sum(out**2), (out, weights)

    gradient, (out, weights) = jax.jit(jax.grad(loss, has_aux=True))(q)
    expected, expected_weights = _naive(q, k, v, mask)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(weights, expected_weights, atol=1e-5)
    assert not np.asarray(out)[0, 2].any() and not np.asarray(weights)[0, :, 2].any()
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[0, 2].any()


# --- flash ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 48])
def test_flash_is_xla(interpreted, window):
    q, blocks = random_blocks(window=window)
    out, gradients = output_and_gradients(q, blocks, "flash")
    assert_same((out, gradients), output_and_gradients(q, blocks, "xla"))
    padding = np.asarray(blocks[0].mask.queries.segment_ids) == 0
    assert padding.any() and not np.asarray(out)[padding].any() and not np.asarray(gradients[0])[padding].any()


def test_gradients_of_queries_that_do_not_fit_the_core_are_made_in_parts(interpreted, monkeypatch):
    q, blocks = random_blocks(rows=ROWS[:1])
    expected = output_and_gradients(q, blocks, "xla")
    monkeypatch.setattr(attention_tpu, "MAX_SUMS", 1)
    assert_same(output_and_gradients(q, blocks, "flash"), expected)


def test_flash_reads_bfloat16_and_a_stream_alone(interpreted):
    q, blocks = random_blocks(jnp.bfloat16, head_dim=16, rows=ROWS[:1])
    out, expected = (jax.jit(lambda q, impl=impl: attend(q, blocks[1:], impl)[0])(q) for impl in ("flash", "xla"))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out), np.float32(expected), atol=0.02)  # bfloat16 has 8 bits


def test_visits_are_the_needed_tiles_in_order_and_one_of_each_outer_tile():
    rng = np.random.default_rng(0)
    needed = rng.random((20, 3, 5)) < 0.3
    visits = jax.tree.map(np.asarray, attention_tpu._visits(jnp.array(needed)))
    for b in range(20):
        wanted = [(i, j) for i in range(3) for j in (np.flatnonzero(needed[b, i]) if needed[b, i].any() else [0])]
        seen = list(zip(visits.outer[b], visits.inner[b], strict=True))
        assert visits.count[b] == len(wanted) and seen[: len(wanted)] == wanted
        assert set(seen[len(wanted) :]) <= {wanted[-1]}  # nothing more is copied


def test_tiles_are_whole_lanes_and_even():
    for length, tile in ((1, 128), (128, 128), (512, 512), (513, 384), (1024, 512), (1600, 512), (3328, 512)):
        assert attention_tpu._tile(length, 512) == tile


@pytest.mark.multi_device
@pytest.mark.parametrize("sizes", [(2, 1, 2), (1, 1, 4)])  # the two key/value heads do not divide by 4
def test_flash_on_a_mesh_is_xla_on_one_device(interpreted, sizes):
    config = tiny_config().model
    model = dataclasses.replace(config, vision=dataclasses.replace(config.vision, num_heads=4))
    q, blocks = random_blocks(head_dim=8)
    expected = output_and_gradients(q, blocks, "xla")
    mesh = parallel.make_mesh(MeshConfig(*sizes), jax.devices()[:4])
    with parallel.use(mesh, parallel.make_rules(model, mesh)):
        assert_same(output_and_gradients(q, blocks, "flash"), expected)
        if sizes[0] > 1:
            with pytest.raises(ValueError, match=r"3 rows do not divide over 2 devices"):
                attend(q[:3], [jax.tree.map(lambda x: x[:3], block) for block in blocks], "flash")


def test_a_model_with_flash_is_one_with_xla(interpreted):
    config = tiny_config().model
    rng = np.random.default_rng(0)
    batch = make_batch(config, [random_layout(rng, 9, images, 100) for images in (0, 1, 2)], max_images=2)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), abstract_params(config))

    def run(impl):
        model = Saisa(dataclasses.replace(config, attention_impl=impl))
        return jax.jit(lambda p: model.apply({"params": p}, batch)[0][..., : config.vocab_size])(params)

    np.testing.assert_allclose(run("flash"), run("xla"), atol=1e-4)


@pytest.mark.multi_device
@pytest.mark.parametrize(("remat_policy", "kernels"), [("full", 3), ("names", 2)])
def test_a_sharded_step_with_flash_lowers_for_tpus(remat_policy, kernels):
    """Forward and backward; under `full` forward once more."""
    config = dataclasses.replace(
        tiny_config().model, dtype="bfloat16", remat_policy=remat_policy, attention_impl="flash"
    )
    mesh = parallel.make_mesh(MeshConfig(2, 2, 2))
    batch = make_batch(config, [[1, 2, 3]] * 8, max_images=1)
    loss = lambda params: jnp.sum(Saisa(config).apply({"params": params}, batch)[0][..., 0])  # noqa: E731
    params = abstract_params(config)
    with parallel.use(mesh, parallel.make_rules(config, mesh)):
        exported = export.export(jax.jit(jax.grad(loss)), platforms=["tpu"])(params)
    assert exported.mlir_module().count("tpu_custom_call") == kernels


@pytest.mark.parametrize(("dtype", "head_dim"), [(jnp.bfloat16, 128), (jnp.float32, 80)])
def test_flash_lowers_for_tpus(dtype, head_dim):
    q, blocks = random_blocks(dtype, head_dim=head_dim, window=100)
    lowered = export.export(jax.jit(lambda q: output_and_gradients(q, blocks, "flash")), platforms=["tpu"])(q)
    assert lowered.mlir_module().count("tpu_custom_call") == 2


@pytest.mark.aot
@pytest.mark.parametrize(
    ("topology", "dtype", "head_dim", "window"),
    [
        ("v5e:2x2", jnp.bfloat16, 128, None),
        ("v5e:2x2", jnp.float32, 80, 100),
        ("v5p:2x2x1", jnp.bfloat16, 64, None),
        ("v6e:2x2", jnp.bfloat16, 128, None),
    ],
)
def test_flash_compiles_for_tpus_and_holds_no_scores(monkeypatch, topology, dtype, head_dim, window):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = parallel.make_mesh(MeshConfig(1, 1, -1), devices)
    q, blocks = random_blocks(dtype, heads=8, kv_heads=4, head_dim=head_dim, window=window)
    sharded = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=parallel.replicated(mesh))  # noqa: E731
    with parallel.use(mesh, parallel.RULES):
        run = jax.jit(lambda q, blocks: output_and_gradients(q, blocks, "flash"))
        compiled = run.lower(*jax.tree.map(sharded, (q, blocks))).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 2
    scores = len(ROWS) * 2 * TEXT * (VISUAL + TEXT) * 4  # of the two heads of a device
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * scores


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("impl", "dtype", "head_dim", "message"),
    [
        ("cudn", jnp.float32, 8, r"model.attention_impl='cudn' is unknown; known: xla, flash, cudnn"),
        ("flash", jnp.float16, 8, r"flash is for bfloat16 and float32, not model.dtype=float16"),
        ("flash", jnp.float32, 12, r"multiple of 8, such as 16, not 12"),
        ("cudnn", jnp.float32, 64, r"cudnn is for bfloat16 and float16, not model.dtype=float32"),
        ("cudnn", jnp.bfloat16, 12, r"multiple of 8 up to 256, such as 16, not 12"),
        ("cudnn", jnp.bfloat16, 320, r"multiple of 8 up to 256, such as 256, not 320"),
    ],
)
def test_what_cannot_be_served_is_an_error_that_names_what_can(impl, dtype, head_dim, message):
    q, blocks = random_blocks(dtype, head_dim=head_dim, rows=ROWS[:1])
    with pytest.raises(ValueError, match=message):
        attend(q, blocks, impl)


def test_attention_is_captured_under_xla_alone():
    config = dataclasses.replace(tiny_config().model, attention_impl="flash")
    batch, params = make_batch(config, [[1, 2, 3]], max_images=1), abstract_params(config)
    with pytest.raises(
        ValueError, match=r"attention_impl=flash never holds the attention .* set model.attention_impl=xla"
    ):
        jax.eval_shape(lambda params: Saisa(config).apply({"params": params}, batch, capture=("attention",)), params)


def test_an_implementation_for_other_devices_is_an_error():
    config = tiny_config().model
    mesh = parallel.make_mesh(MeshConfig(-1, 1, 1))
    parallel.attention_of(config, mesh)
    for impl, platform in (("flash", "tpu"), ("cudnn", "gpu")):
        message = f"{impl} runs on {platform}, and the devices are cpu: set --config.model.attention_impl=xla"
        with pytest.raises(ConfigError, match=message):
            parallel.attention_of(dataclasses.replace(config, attention_impl=impl), mesh)


@pytest.mark.parametrize(
    ("platform", "kind", "dtype", "head_dim", "chosen"),
    [
        ("tpu", "TPU v5 lite", "bfloat16", 128, "flash"),
        ("tpu", "TPU v5 lite", "float16", 128, "xla"),
        ("gpu", "NVIDIA H100 80GB HBM3", "bfloat16", 128, "cudnn"),
        ("gpu", "NVIDIA H100 80GB HBM3", "float32", 128, "xla"),
        ("gpu", "NVIDIA H100 80GB HBM3", "bfloat16", 20, "xla"),
        ("gpu", "AMD Instinct MI300X", "bfloat16", 128, "xla"),
        ("cpu", "cpu", "bfloat16", 128, "xla"),
    ],
)
def test_auto_is_what_suits_the_devices(platform, kind, dtype, head_dim, chosen):
    config = dataclasses.replace(tiny_config().model, dtype=dtype, head_dim=head_dim)
    assert parallel.fused_attention(config, platform, SimpleNamespace(device_kind=kind)) == chosen


def test_auto_is_xla_on_a_gpu_of_before_ampere():
    device = SimpleNamespace(device_kind="NVIDIA TITAN V", compute_capability="7.0")
    config = dataclasses.replace(tiny_config().model, dtype="bfloat16")
    assert parallel.fused_attention(config, "gpu", device) == "xla"
