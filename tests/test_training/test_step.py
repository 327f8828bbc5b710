"""The train step: accumulation, skipped steps, lighter dtypes, and what its backward pass does not compute."""

import dataclasses
import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saisa_jax import flops, parallel, presets
from saisa_jax.batch import empty_batch
from saisa_jax.config import (
    REMAT_POLICIES,
    TRAIN_ADAPTERS,
    TRAIN_ALL,
    TRAIN_PROJECTOR,
    GroupConfig,
    Groups,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ProjectorConfig,
)
from saisa_jax.models.saisa import Saisa, abstract_params, init_params
from saisa_jax.testing.batches import make_batch, random_layout
from saisa_jax.testing.configs import tiny_config
from saisa_jax.testing.programs import equations
from saisa_jax.training.optimizer import Optimizer, flatten, make_optimizer, split
from saisa_jax.training.state import create_state, make_state, state_shardings
from saisa_jax.training.step import held_by, make_train_step, micro_batches_of

TINY = tiny_config().model
ADAMW = OptimizerConfig(lr=1e-2, warmup_fraction=0.5)
# New parameters are the old ones less the gradient: what is compared are gradients.
DESCENT = Optimizer(*optax.sgd(1.0), lambda state: jnp.ones(()))


def batch_of(config: ModelConfig = TINY):
    """Rows of different lengths and numbers of images, with weights of all sizes."""
    rng = np.random.default_rng(0)
    batch = make_batch(config, [random_layout(rng, 9 - i % 5, i % 3, 100) for i in range(8)], max_images=2)
    batch["loss_weights"] *= rng.random(batch["loss_weights"].shape, np.float32)
    batch["loss_weights"][3] = 0
    return batch


class Training:
    """A state and its compiled step on a mesh."""

    def __init__(self, sizes=(1, 1, 1), optimizer: Optimizer | None = None, **options):
        self.mesh = parallel.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        self.rules = parallel.make_rules(TINY, self.mesh)
        params = jax.tree.map(np.asarray, init_params(TINY, jax.random.key(0)))
        optimizer = optimizer or make_optimizer(ADAMW, TRAIN_ALL, params, 10)
        shardings = state_shardings(TINY, TRAIN_ALL, optimizer, self.mesh, self.rules)
        with parallel.use(self.mesh, self.rules):
            self.state = create_state(lambda params: params, params, TRAIN_ALL, optimizer, shardings)
            step = make_train_step(TINY, optimizer, shardings, **options)
            self.step = step.lower(self.state, parallel.to_device(batch_of(), self.mesh)).compile()

    def __call__(self, batch):
        self.state, metrics = self.step(self.state, parallel.to_device(batch, self.mesh))
        return {name: float(value) for name, value in metrics.items()}

    def params(self):
        return {path: np.asarray(leaf) for path, leaf in flatten(self.state.trainable).items()}


# --- Accumulation ----------------------------------------------------------------------------------------------------

# Types of what devices send one another.
SENT = re.compile(r"= (\S+) (?:all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)")


@pytest.fixture(scope="module")
def whole():
    """Metrics and parameters after a step on the whole batch."""
    training = Training(optimizer=DESCENT)
    return training(batch_of()), training.params()


@pytest.mark.parametrize(("parts", "sizes"), [(4, (1, 1, 1)), (2, (2, 2, 2))])
def test_accumulated_is_one_batch(whole, parts, sizes):
    expected, params = whole
    training = Training(sizes, DESCENT, accumulation=parts, loss_chunk=4)
    assert training(batch_of()) == pytest.approx(expected, abs=1e-6, rel=1e-6)
    for path, leaf in training.params().items():
        tolerance = 1e-6 * max(1.0, np.abs(params[path]).max())  # gradients of embeddings are larger than 1
        np.testing.assert_allclose(leaf, params[path], atol=tolerance, err_msg=path)
    # Devices send one another parameters, gradients and activations, but no images: they are uint8.
    program = training.step.as_text()
    sent = SENT.findall(program)
    assert bool(sent) == (sizes != (1, 1, 1)) and not [kind for kind in sent if "u8" in kind]
    # Sums of gradients are split as their parameters are, and each leaf of the state is written over its predecessor.
    shares = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(training.state.trainable)]
    loop = re.search(r'= \((.*)\) while\(.*op_name="jit\(train_step\)/while"', program)
    carried = Counter(re.findall(r"f32\[([\d,]*)\]", loop[1]))
    assert not Counter(",".join(map(str, share.shape)) for share in shares) - carried
    if sizes != (1, 1, 1):
        assert not {"2,32,64", "2,64,32", "128,32", "32,128"} & set(carried)
    state = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(training.state))
    assert training.step.memory_analysis().alias_size_in_bytes == state


@pytest.mark.multi_device
def test_micro_batches_move_no_row_to_another_device():
    mesh = parallel.make_mesh(MeshConfig(4, 2, 1))
    images = np.arange(32 * 2 * 3, dtype=np.uint8).reshape(32, 2, 3)
    with parallel.use(mesh, parallel.make_rules(TINY, mesh)):
        placed = parallel.to_device(images, mesh)
        parts = jax.jit(lambda x: micro_batches_of(x, 2)).lower(placed).compile()
        assert not SENT.search(parts.as_text())
        micro = parts(placed)
    np.testing.assert_array_equal(micro[1], images[1::2])
    assert micro.sharding.spec[:2] == (None, parallel.BATCH_AXES)


# --- Steps that are not finite ---------------------------------------------------------------------------------------


def test_what_a_batch_held_leaves_out_padding_and_dropped_samples():
    batch = empty_batch(3, 6, 2, 8)
    batch["segment_ids"][:] = [[1, 1, 2, 3, 3, 0], [0, 0, 0, 1, 3, 3], [0] * 6]  # padding on either side; 2 was dropped
    batch["image_segment_ids"][:] = [[1, 3], [3, 0], [0, 0]]
    held = {name: float(share) for name, share in held_by(batch).items()}
    assert held == pytest.approx({"samples": 5, "text_fill": 8 / 18, "image_fill": 3 / 6})
    assert set(held_by(empty_batch(3, 6, 0, 8))) == {"samples", "text_fill"}


def test_a_step_that_is_not_finite_changes_nothing_but_the_counter():
    bad = batch_of()
    bad["loss_weights"][0, 0] = np.inf
    training = Training()
    start = jax.tree.map(np.asarray, training.state)
    undisturbed = [training(batch_of()) for _ in range(2)]
    expected = training.params()

    training.state = jax.tree.map(lambda leaf, now: jax.device_put(leaf, now.sharding), start, training.state)
    disturbed = []
    for step, batch in enumerate([batch_of(), bad, bad, batch_of()], start=1):
        before = jax.tree.map(np.asarray, (training.state.trainable, training.state.opt_state))
        metrics = training(batch)
        assert int(training.state.step) == step and metrics["skipped"] == float(batch is bad)
        if batch is bad:
            jax.tree.map(np.testing.assert_array_equal, before, (training.state.trainable, training.state.opt_state))
            assert not np.isfinite(metrics["loss"])
        else:
            disturbed.append(metrics)
    assert disturbed == undisturbed  # their rates among them: a skipped step is none of the schedule
    assert disturbed[1]["lr"] == pytest.approx(ADAMW.lr / 5)
    for path, leaf in training.params().items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


# --- Lighter dtypes --------------------------------------------------------------------------------------------------


def test_masters_and_first_moments_may_be_lighter_and_second_moments_are_float32():
    groups: Groups = (("layers/mlp/.*", GroupConfig(dtype="bfloat16")), (".*", GroupConfig()))
    settings = dataclasses.replace(ADAMW, first_moment_dtype="bfloat16")
    state, step, batch = abstract_step(TINY, groups, 8, 9, settings)
    adam = state.opt_state[1]
    path = "layers/mlp/up_proj/kernel"
    kinds = [flatten(tree)[path].dtype for tree in (state.trainable, adam.mu, adam.nu)]
    assert kinds == ["bfloat16", "bfloat16", "float32"]
    after, _ = jax.eval_shape(step, state, batch)
    dtypes = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]  # noqa: E731
    assert dtypes(after) == dtypes(state)  # one program serves every step


# --- Rematerialisation -----------------------------------------------------------------------------------------------


def test_every_remat_policy_gives_the_same_gradients_and_keeps_what_it_says():
    batch = batch_of()
    rng = np.random.default_rng(1)
    random = lambda shape: jnp.asarray(rng.normal(0, 0.2, shape), jnp.float32)  # noqa: E731
    features = random((8, 2 * TINY.vision.num_patches, TINY.vision.embed_dim))
    params = jax.tree.map(lambda leaf: random(leaf.shape), abstract_params(TINY))

    def squares(policy, layers):
        model = Saisa(dataclasses.replace(TINY, remat_policy=policy))
        hidden, _ = model.apply({"params": params | {"layers": layers}}, batch, features, method=Saisa.hidden)
        return jnp.sum(hidden**2)

    products, gradients = {}, {}
    for policy in REMAT_POLICIES:
        traced = jax.jit(jax.grad(functools.partial(squares, policy))).trace(params["layers"])
        products[policy] = flops.count(traced.jaxpr.jaxpr)
        gradients[policy] = flatten(traced.lower().compile()(params["layers"]))
        for path, expected in gradients["none"].items():
            difference = np.abs(gradients[policy][path] - expected).max()
            assert difference <= 1e-5 * np.abs(expected).max(), f"{path} {policy}"
    assert products["none"] == products["dots"] < products["dots_no_batch"] < products["names"] < products["full"]


# --- What runs backward ----------------------------------------------------------------------------------------------


def abstract_step(config: ModelConfig, groups: Groups, rows: int, text: int, settings=ADAMW, **options):
    """(state, step, batch), nothing of which takes memory, also not at 7B."""
    params = abstract_params(config)
    trainable, _ = jax.eval_shape(lambda params: split(params, groups), params)
    optimizer = make_optimizer(settings, groups, trainable, 10)
    mesh = parallel.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    shardings = state_shardings(config, groups, optimizer, mesh, parallel.make_rules(config, mesh))
    state = jax.eval_shape(lambda params: make_state(params, groups, optimizer), params)
    batch = empty_batch(rows, text, 1, config.vision.image_size)
    return state, make_train_step(config, optimizer, shardings, **options), batch


def test_stage_1_at_7b_runs_backward_through_activations_alone():
    shared = ProjectorConfig(sharing="shared")
    config = presets.make("vicuna-7b", "clip-vit-l-336", "saisa", projector=shared)
    state, step, batch = abstract_step(config, TRAIN_PROJECTOR, 2, 1024, loss_chunk=256)
    program = jax.make_jaxpr(step)(state, batch).jaxpr
    needed = flops.training(config, TRAIN_PROJECTOR, 2, 1024)
    assert flops.count(program) == needed.total + needed.forward.head  # which is made once more in the backward pass
    assert flops.count(program) == pytest.approx(needed.total, rel=0.01)
    # No product makes a gradient of a decoder's kernel, nor of the encoder's, nor of the embedding.
    makes = [eqn.outvars[0].aval.shape for eqn, _ in equations(program) if eqn.primitive.name == "dot_general"]
    wide, width = config.mlp_dim, config.embed_dim
    assert (2, 1024, wide) in makes
    assert not {(wide, width), (width, wide), (1024, 4096), (width, 32000), (32000, width)} & set(makes)
    assert not [eqn for eqn, _ in equations(program) if eqn.primitive.name.startswith("scatter")]


def test_nothing_runs_backward_through_a_frozen_encoder():
    """Nor does anything of it stay for a backward pass: what is transposed is named so in the lowered program."""
    backward = r'transpose\(jvp\([^"]*/vision/'
    for groups in (TRAIN_PROJECTOR, TRAIN_ALL):
        state, step, batch = abstract_step(TINY, groups, 2, 9)
        program = step.lower(state, batch).as_text(debug_info=True)
        assert bool(re.search(backward, program)) == (groups is TRAIN_ALL)
        assert re.search(r'"[^"]*/vision/[^"]*dot_general', program)


def test_lora_runs_backward_through_no_kernel_that_it_adapts():
    config = dataclasses.replace(TINY, lora=LoraConfig(rank=4))
    state, step, batch = abstract_step(config, TRAIN_ADAPTERS, 2, 16)
    assert flops.count(jax.make_jaxpr(step)(state, batch).jaxpr) == flops.train_step(config, TRAIN_ADAPTERS, 2, 16)
