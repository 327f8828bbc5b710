"""Sharded == unsharded: the same losses and the same parameters on every mesh."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import numpy as np
import pytest

from saisa_jax import parallel
from saisa_jax.batch import Batch
from saisa_jax.config import TRAIN_ALL, MeshConfig, ModelConfig, OptimizerConfig
from saisa_jax.models.saisa import init_params
from saisa_jax.testing.batches import make_packed_batch, random_layout
from saisa_jax.testing.configs import PROJECTORS, tiny_config
from saisa_jax.training.optimizer import flatten, make_optimizer
from saisa_jax.training.state import TrainState, create_state, state_shardings
from saisa_jax.training.step import make_train_step

pytestmark = pytest.mark.multi_device

STEPS = 5
ALIGNMENTS = ("saisa", "naavit", "llava", "flamingo")
MESHES = ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2))
OFTEN = (
    *(("saisa", mesh) for mesh in MESHES),
    *((name, (2, 2, 2)) for name in ("naavit", "llava", "casa")),
)
SELDOM = [(alignment, mesh) for alignment in ALIGNMENTS for mesh in MESHES if (alignment, mesh) not in OFTEN]
SELDOM += [(projector, (2, 2, 2)) for projector in PROJECTORS]


def model_of(alignment: str) -> ModelConfig:
    """All that divides by 8 does, but for the two key/value heads; of the vocabulary's 256 rows 129 are tokens."""
    model = tiny_config(alignment).model
    newer = {"qk_norm": True, "unrotated_layers": (1,)} if alignment in ("naavit", "casa") else {}
    vision = dataclasses.replace(model.vision, num_heads=8, num_registers=3 if newer else 0)
    return dataclasses.replace(model, vision=vision, num_heads=8, head_dim=4, vocab_size=129, **newer)


def batch_of(model: ModelConfig) -> Batch:
    """Rows of up to three samples with up to two images each; the last two rows are text alone, and padding."""
    rng = np.random.default_rng(0)
    images = [[0, 2], [1], [1, 0, 1], [2, 1], [1, 1], [0, 1], [0, 0], []]
    rows = [[random_layout(rng, 9 - 2 * len(row), count, model.vocab_size) for count in row] for row in images]
    return make_packed_batch(model, rows)


@functools.cache
def start(alignment: str) -> dict[str, Any]:
    params = jax.jit(functools.partial(init_params, model_of(alignment)))(jax.random.key(0))
    return jax.tree.map(np.asarray, params)


@functools.cache
def train(alignment: str, sizes: tuple[int, int, int]) -> tuple[list[float], TrainState, TrainState, TrainState]:
    """Losses, the first state and the last one, and where they were to live."""
    model, params = model_of(alignment), start(alignment)
    mesh = parallel.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    rules = parallel.make_rules(model, mesh)
    # Some true gradients are 0 (biases of keys); a large eps keeps Adam from making steps of their rounding.
    settings = OptimizerConfig(lr=1e-2, warmup_fraction=0.0, eps=1e-3)
    optimizer = make_optimizer(settings, TRAIN_ALL, params, STEPS)
    shardings = state_shardings(model, TRAIN_ALL, optimizer, mesh, rules)
    losses = []
    with parallel.use(mesh, rules):
        first = state = create_state(lambda params: params, params, TRAIN_ALL, optimizer, shardings)
        step, batch = make_train_step(model, optimizer, shardings), parallel.to_device(batch_of(model), mesh)
        for _ in range(STEPS):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    return losses, first, state, shardings


def check(alignment: str, sizes: tuple[int, int, int]) -> None:
    losses, _, expected, _ = train(alignment, (1, 1, 1))
    assert losses[-1] < losses[0] - 0.1
    others, _, state, _ = train(alignment, sizes)
    np.testing.assert_allclose(others, losses, atol=1e-5)
    parameters = flatten(state.trainable)
    for path, leaf in flatten(expected.trainable).items():
        np.testing.assert_allclose(parameters[path], leaf, atol=1e-5, rtol=0, err_msg=path)


@pytest.mark.parametrize(("alignment", "sizes"), OFTEN)
def test_sharded_is_unsharded(alignment, sizes, capfd):
    check(alignment, sizes)
    assert (
        "full rematerialization" not in capfd.readouterr().err
    )  # the compiler's word for: replicated, for want of a way


def test_parameters_are_born_sharded_and_read_sharded():
    model, params = model_of("saisa"), start("saisa")
    mesh = parallel.make_mesh(MeshConfig(2, 2, 2))
    rules = parallel.make_rules(model, mesh)
    optimizer = make_optimizer(OptimizerConfig(), TRAIN_ALL, params, STEPS)
    shardings = state_shardings(model, TRAIN_ALL, optimizer, mesh, rules)
    shares = jax.tree.map(lambda leaf, where: math.prod(where.shard_shape(leaf.shape)), params, shardings.trainable)
    share = 4 * sum(jax.tree.leaves(shares))  # bytes of a device

    def compiled(make, argument):
        state = jax.jit(lambda argument: create_state(make, argument, TRAIN_ALL, optimizer, shardings))
        with parallel.use(mesh, rules):
            return state.lower(argument).compile()

    born = compiled(functools.partial(init_params, model), jax.random.key(0))
    made = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"= \w+\[([\d,]+)\]", born.as_text())]
    # At no time is there more of a parameter on a device than its share.
    assert max(made) == max(jax.tree.leaves(shares)) < max(leaf.size for leaf in jax.tree.leaves(params)) / 2
    assert 3 * share <= born.memory_analysis().output_size_in_bytes < 3.1 * share
    jax.tree.map(np.testing.assert_array_equal, born(jax.random.key(0)).trainable, params)
    # Nor does more than its share travel to a device from a checkpoint.
    read = compiled(lambda params: params, params)
    assert read.memory_analysis().argument_size_in_bytes == share


@pytest.mark.slow
@pytest.mark.parametrize(("alignment", "sizes"), SELDOM)
def test_sharded_is_unsharded_on_the_other_meshes(alignment, sizes):
    check(alignment, sizes)


@pytest.mark.parametrize("sizes", [(1, 1, 8), (2, 2, 2)])
def test_the_padding_of_a_split_vocabulary_learns_nothing(sizes):
    _, _, state, _ = train("saisa", sizes)
    before, after = start("saisa"), state.trainable
    assert after["lm_head"]["kernel"].shape == (32, 256)
    np.testing.assert_array_equal(after["lm_head"]["kernel"][:, 129:], before["lm_head"]["kernel"][:, 129:])
    np.testing.assert_array_equal(after["embed_tokens"]["embedding"][129:], before["embed_tokens"]["embedding"][129:])
    assert np.abs(after["lm_head"]["kernel"][:, :129] - before["lm_head"]["kernel"][:, :129]).min(0).max() > 1e-3


def test_the_old_state_is_given_up_and_the_new_one_lives_where_the_table_says():
    _, first, state, shardings = train("saisa", (2, 2, 2))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    placed = jax.tree.map(lambda leaf, want: leaf.sharding.is_equivalent_to(want, leaf.ndim), state, shardings)
    assert all(jax.tree.leaves(placed))
