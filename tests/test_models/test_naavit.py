"""The mask against its definition written as loops, and attention against a naive softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saisa_jax.models.naavit import KeyBlock, attend, may_attend


def test_the_worked_example_of_the_docstring():
    text_positions, visual_positions = jnp.array([[0, 3, 4]]), jnp.array([[1, 2]])
    ones, two = jnp.ones((1, 3), jnp.int32), jnp.ones((1, 2), jnp.int32)
    assert may_attend(text_positions, ones, visual_positions, two)[0].astype(int).tolist() == [[0, 0], [1, 1], [1, 1]]
    own = may_attend(text_positions, ones, text_positions, ones)[0].astype(int).tolist()
    assert own == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize("window", [None, 3])
def test_mask_is_its_definition(window):
    rng = np.random.default_rng(0)
    qp, kp = rng.integers(0, 9, (2, 5)), rng.integers(0, 9, (2, 7))
    qs, ks = rng.integers(0, 3, (2, 5)), rng.integers(0, 3, (2, 7))
    mask = may_attend(jnp.array(qp), jnp.array(qs), jnp.array(kp), jnp.array(ks), window)
    for b in range(2):
        for t in range(5):
            for s in range(7):
                legal = qs[b, t] == ks[b, s] and ks[b, s] > 0 and qp[b, t] >= kp[b, s]
                legal = legal and (window is None or qp[b, t] - kp[b, s] < window)
                assert bool(mask[b, t, s]) == bool(legal)


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
    mask = rng.random((2, 5, 9)) < 0.5
    mask[0, 2] = False
    blocks = [KeyBlock(jnp.array(k[:, :, s]), jnp.array(v[:, :, s]), jnp.array(mask[:, :, s])) for s in
              (slice(0, 4), slice(4, 9))]  # fmt: skip
    out, weights = attend(jnp.array(q), blocks)
    expected, expected_weights = _naive(q, k, v, mask)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(weights, expected_weights, atol=1e-5)
    assert not np.asarray(out)[0, 2].any() and not np.asarray(weights)[0, :, 2].any()

    gradient = jax.grad(lambda q: jnp.sum(attend(q, blocks)[0] ** 2))(jnp.array(q))
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[0, 2].any()


def test_unknown_implementation_is_an_error():
    block = KeyBlock(jnp.zeros((1, 1, 1, 2)), jnp.zeros((1, 1, 1, 2)), jnp.ones((1, 1, 1), bool))
    with pytest.raises(ValueError, match="attention_impl='cudn'"):
        attend(jnp.zeros((1, 1, 1, 2)), [block], "cudn")
