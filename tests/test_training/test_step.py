"""The train step: accumulation, skipped steps, lighter dtypes, and what its backward pass does not compute."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saisa_jax import parallel
from saisa_jax.batch import empty_batch
from saisa_jax.config import (
    TRAIN_ALL,
    TRAIN_PROJECTOR,
    GroupConfig,
    Groups,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ProjectorConfig,
)
from saisa_jax.models import flops, presets
from saisa_jax.models.saisa import abstract_params, init_params
from saisa_jax.testing.batches import make_batch, random_layout
from saisa_jax.testing.configs import tiny_config
from saisa_jax.testing.programs import equations, products_in
from saisa_jax.training.optimizer import Optimizer, flatten, make_optimizer, split
from saisa_jax.training.state import create_state, make_state, state_shardings
from saisa_jax.training.step import make_train_step, micro_batches_of

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
    """A state, its step and its mesh."""

    def __init__(self, config=TINY, groups=TRAIN_ALL, optimizer=None, sizes=(1, 1, 1), **options):
        self.mesh = parallel.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        self.rules = parallel.make_rules(config, self.mesh)
        params = jax.tree.map(np.asarray, init_params(config, jax.random.key(0)))
        optimizer = optimizer or make_optimizer(ADAMW, groups, split(params, groups)[0], 10)
        shardings = state_shardings(config, groups, optimizer, self.mesh, self.rules)
        with parallel.use(self.mesh, self.rules):
            self.state = create_state(lambda params: params, params, groups, optimizer, shardings)
        self.step = make_train_step(config, optimizer, shardings, **options)

    def __call__(self, batch):
        with parallel.use(self.mesh, self.rules):
            self.state, metrics = self.step(self.state, parallel.to_device(batch, self.mesh))
        return {name: float(value) for name, value in metrics.items()}

    def compiled(self, batch) -> str:
        with parallel.use(self.mesh, self.rules):
            return self.step.lower(self.state, parallel.to_device(batch, self.mesh)).compile().as_text()

    def params(self):
        return {path: np.asarray(leaf) for path, leaf in flatten(self.state.trainable).items()}


# --- Accumulation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parts", "sizes"), [(2, (1, 1, 1)), (8, (1, 1, 1)), (2, (2, 2, 2))])
def test_accumulated_is_one_batch(parts, sizes):
    whole = Training(optimizer=DESCENT)
    split_up = Training(optimizer=DESCENT, sizes=sizes, accumulation=parts, loss_chunk=4)
    expected, got = whole(batch_of()), split_up(batch_of())
    assert got == pytest.approx(expected, abs=1e-6, rel=1e-6)
    for path, leaf in whole.params().items():
        np.testing.assert_allclose(split_up.params()[path], leaf, atol=1e-6, err_msg=path)


COLLECTIVE = re.compile(r"= (\S+) (?:all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)")


@pytest.mark.multi_device
def test_micro_batches_move_no_row_to_another_device():
    training = Training(optimizer=DESCENT, sizes=(4, 2, 1), accumulation=1)
    batch = jax.tree.map(lambda x: np.concatenate([x] * 4), batch_of())
    with parallel.use(training.mesh, training.rules):
        placed = parallel.to_device(batch, training.mesh)
        parts = jax.jit(lambda batch: micro_batches_of(batch, 2))
        assert not COLLECTIVE.search(parts.lower(placed).compile().as_text())
        micro = parts(placed)
    np.testing.assert_array_equal(micro["images"][1], batch["images"][1::2])
    assert micro["images"].sharding.spec[:2] == (None, parallel.BATCH_AXES)
    # Nor in the step as a whole: what it sends are products of images, never images.
    sent = COLLECTIVE.findall(Training(optimizer=DESCENT, sizes=(2, 2, 2), accumulation=2).compiled(batch_of()))
    assert sent and not [shape for shape in sent if shape.startswith(("u8", "(u8", "s32[8,2,32", "f32[8,2,32,32"))]


# --- Steps that are not finite ---------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_changes_nothing_but_the_counter():
    bad = batch_of()
    bad["loss_weights"][0, 0] = np.inf
    training, undisturbed = Training(), Training()
    for step, batch in enumerate([batch_of(), bad, bad, batch_of()], start=1):
        before = jax.tree.map(np.asarray, (training.state.trainable, training.state.opt_state))
        metrics = training(batch)
        assert int(training.state.step) == step
        assert metrics["skipped"] == float(batch is bad) and np.isfinite(metrics["loss"]) == (batch is not bad)
        if batch is bad:
            jax.tree.map(np.testing.assert_array_equal, before, (training.state.trainable, training.state.opt_state))
        else:
            assert undisturbed(batch) == metrics  # the rate among them: a skipped step is none of the schedule
    assert metrics["lr"] == pytest.approx(ADAMW.lr / 5)
    for path, leaf in undisturbed.params().items():
        np.testing.assert_array_equal(training.params()[path], leaf, err_msg=path)


# --- Lighter dtypes --------------------------------------------------------------------------------------------------


def test_masters_and_first_moments_may_be_lighter_and_second_moments_are_float32():
    groups: Groups = (("layers/mlp/.*", GroupConfig(dtype="bfloat16")), (".*", GroupConfig()))
    light = dataclasses.replace(ADAMW, first_moment_dtype="bfloat16")
    training = Training(groups=groups, optimizer=make_optimizer(light, groups, split(abstract(TINY), groups)[0], 10))
    kinds = jax.tree.map(lambda leaf: leaf.dtype, training.state)
    training(batch_of())
    assert jax.tree.map(lambda leaf: leaf.dtype, training.state) == kinds  # the same program serves every step
    adam = training.state.opt_state[1]
    path = "layers/mlp/up_proj/kernel"
    got = [str(flatten(tree)[path].dtype) for tree in (training.state.trainable, adam.mu, adam.nu)]
    assert got == ["bfloat16", "bfloat16", "float32"]


def abstract(config: ModelConfig):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_params(config))


# --- What runs backward ----------------------------------------------------------------------------------------------


def program_of(config: ModelConfig, groups: Groups, rows: int, text: int, **options):
    """The step's jaxpr; nothing is computed, also not at 7B."""
    params = abstract_params(config)
    trainable, _ = jax.eval_shape(lambda params: split(params, groups), params)
    optimizer = make_optimizer(ADAMW, groups, trainable, 10)
    mesh = parallel.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    shardings = state_shardings(config, groups, optimizer, mesh, parallel.make_rules(config, mesh))
    state = jax.eval_shape(lambda params: make_state(params, groups, optimizer), params)
    batch = empty_batch(rows, text, 1, config.vision.image_size)
    return jax.make_jaxpr(make_train_step(config, optimizer, shardings, **options))(state, batch).jaxpr


def test_stage_1_at_7b_runs_backward_through_activations_alone():
    shared = ProjectorConfig(sharing="shared")
    config = presets.make("vicuna-7b", "clip-vit-l-336", "saisa", projector=shared)
    program = program_of(config, TRAIN_PROJECTOR, 2, 1024, loss_chunk=256)
    head = 2 * flops.prefill(config, 1024, head_rows=1024).head  # made once more in the backward pass
    counted, formula = products_in(program), flops.train_step(config, TRAIN_PROJECTOR, 2, 1024)
    assert counted == formula + head
    assert counted == pytest.approx(formula, rel=0.01)
    # No product makes a gradient of a decoder's kernel, nor of the encoder's, nor of the embedding.
    makes = [eqn.outvars[0].aval.shape for eqn, _ in equations(program) if eqn.primitive.name == "dot_general"]
    wide, width = config.mlp_dim, config.embed_dim
    assert (2, 1024, wide) in makes
    assert not {(wide, width), (width, wide), (1024, 4096), (width, 32000), (32000, width)} & set(makes)
    assert not [eqn for eqn, _ in equations(program) if eqn.primitive.name.startswith("scatter")]
