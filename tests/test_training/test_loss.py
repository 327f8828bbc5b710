"""Chunked cross-entropy: the numbers of the whole one, and never the whole logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saisa_jax import parallel
from saisa_jax.config import MeshConfig, ModelConfig
from saisa_jax.models.saisa import Saisa, abstract_params
from saisa_jax.testing.configs import tiny_config
from saisa_jax.testing.programs import equations
from saisa_jax.training.loss import chunked_cross_entropy
from saisa_jax.training.state import param_shardings

ROWS, LENGTH, CHUNK = 8, 11, 4  # chunks do not divide the length
TINY = dataclasses.replace(tiny_config().model, vocab_size=200)  # padded to 256


def params_of(config: ModelConfig):
    """Random ones; initialising takes longer."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), abstract_params(config))


def inputs(config: ModelConfig):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(ROWS, LENGTH, config.embed_dim)).astype(np.float32)
    targets = rng.integers(0, config.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    weights = (rng.random((ROWS, LENGTH)) * (rng.random((ROWS, LENGTH)) > 0.3)).astype(np.float32)
    return hidden, targets, weights


def loss_of(config: ModelConfig, chunk: int, params, hidden, targets, weights):
    head = functools.partial(Saisa(config).apply, {"params": params}, method=Saisa.head)
    total, weight = chunked_cross_entropy(head, hidden, targets, weights, chunk)
    return total / weight


def gradient_of(config: ModelConfig, chunk: int):
    return jax.jit(jax.value_and_grad(functools.partial(loss_of, config, chunk), argnums=(0, 1)))


def assert_same(got, expected):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_chunks_change_no_number(tied):
    config = dataclasses.replace(TINY, tie_embeddings=tied)
    params = params_of(config)
    expected = gradient_of(config, 0)(params, *inputs(config))
    assert float(jnp.abs(expected[1][0]["embed_tokens"]["embedding"]).max()) > 1e-3 or not tied
    for chunk in (CHUNK, 1):
        assert_same(gradient_of(config, chunk)(params, *inputs(config)), expected)


@pytest.mark.multi_device
def test_chunks_change_no_number_where_the_vocabulary_is_sharded():
    params = params_of(TINY)
    expected = gradient_of(TINY, 0)(params, *inputs(TINY))
    mesh = parallel.make_mesh(MeshConfig(2, 2, 2))
    rules = parallel.make_rules(TINY, mesh)
    with parallel.use(mesh, rules):
        placed = jax.tree.map(jax.device_put, params, param_shardings(TINY, mesh, rules))
        got = gradient_of(TINY, CHUNK)(placed, *parallel.to_device(inputs(TINY), mesh))
    assert_same(got, expected)


def largest_logits(chunk: int) -> int:
    """Elements of the largest array with rows of logits in the loss and its gradient."""
    params = abstract_params(TINY)
    program = jax.make_jaxpr(gradient_of(TINY, chunk))(params, *inputs(TINY))
    shapes = [out.aval.shape for equation, _ in equations(program.jaxpr) for out in equation.outvars]
    return max(int(np.prod(shape)) for shape in shapes if len(shape) > 2 and shape[-1] == TINY.padded_vocab_size)


def test_the_whole_logits_never_exist():
    assert largest_logits(0) == ROWS * LENGTH * TINY.padded_vocab_size
    assert largest_logits(CHUNK) == ROWS * CHUNK * TINY.padded_vocab_size
