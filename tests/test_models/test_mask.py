"""The mask against its definition written as loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from saisa_jax.models.mask import may_attend


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
