"""Generation: batch == single, end tokens, sampling, and one compilation for each bucket."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saisa_jax.inference.generate import Generator, Sampling, bucket, sample
from saisa_jax.models.saisa import Saisa, init_params
from saisa_jax.testing.batches import IMAGE, make_batch
from saisa_jax.testing.configs import tiny_config
from saisa_jax.testing.gates import with_open_gates
from saisa_jax.testing.programs import compilations

LAYOUTS = [[1, 2, 3, 4, 5], [1, IMAGE, 7, 8], [9, IMAGE, 10, 11, IMAGE, 12, 13]]
NEVER = 127


@functools.cache
def model_of(alignment: str):
    config = tiny_config(alignment).model
    params = with_open_gates(init_params(config, jax.random.key(1)))
    return config, params, Generator(config, [NEVER])


@functools.cache
def forward(config):
    return jax.jit(lambda p, b: Saisa(config).apply({"params": p}, b)[0])


def by_repeated_forward(config, params, layout: list[int], new: int) -> list[int]:
    """Greedy tokens without a cache."""
    tokens, layout = [], list(layout)
    for _ in range(new):
        batch = make_batch(config, [layout], text_length=16, max_images=2)
        length = int((batch["segment_ids"] > 0).sum())
        tokens.append(int(np.argmax(forward(config)(params, batch)[0, length - 1])))
        layout.append(tokens[-1])
    return tokens


@pytest.mark.parametrize("alignment", ["saisa", "naavit", "llava", pytest.param("casa", marks=pytest.mark.slow)])
def test_a_batch_gives_what_each_row_gives_alone_and_without_a_cache(alignment):
    config, params, generator = model_of(alignment)
    batch = make_batch(config, LAYOUTS, text_length=16, max_images=2)
    left = make_batch(config, LAYOUTS, text_length=16, max_images=2, padding="left")
    together = generator(params, batch, 5)
    assert generator(params, left, 5) == together
    assert all(len(row) == 5 for row in together)
    for row in range(len(LAYOUTS)):
        rotated = jax.tree.map(lambda x, row=row: np.roll(x, -row, axis=0), batch)
        assert generator(params, rotated, 5)[0] == together[row]
    # Images depend on the row's number: the reference is for row 0's seed, so compare a text-only and a first row.
    assert by_repeated_forward(config, params, LAYOUTS[0], 5) == together[0]
    one = make_batch(config, [LAYOUTS[2], *LAYOUTS[:2]], text_length=16, max_images=2)
    assert by_repeated_forward(config, params, LAYOUTS[2], 5) == generator(params, one, 5)[0]


def test_an_end_token_ends_its_row_alone_and_empty_rows_give_nothing():
    config, params, generator = model_of("saisa")
    batch = make_batch(config, LAYOUTS, text_length=16, max_images=2)
    free = generator(params, batch, 5)
    stopping = Generator(config, [free[0][2]])
    ended = stopping(params, batch, 5)
    assert ended[0] == free[0][: free[0].index(free[0][2])]
    for row in (1, 2):
        cut = free[row].index(free[0][2]) if free[0][2] in free[row] else 5
        assert ended[row] == free[row][:cut]
    batch["segment_ids"][1], batch["image_segment_ids"][1] = 0, 0
    assert generator(params, batch, 5)[1] == []


def test_a_bucket_compiles_once():
    config, params, generator = model_of("saisa")
    batch = make_batch(config, LAYOUTS, text_length=16, max_images=2)
    generator(params, batch, 5)
    with compilations() as compiled:
        generator(params, make_batch(config, LAYOUTS[::-1], text_length=16, max_images=2), 9)
        generator(params, batch, 3, Sampling(temperature=0.7, top_p=0.9), seed=3)
        generator(params, batch, 3, Sampling(temperature=1, top_p=1), seed=-(2**40))
    assert compiled == []
    assert [bucket(n) for n in (1, 16, 17, 100)] == [16, 16, 32, 128] and bucket(3, smallest=1) == 4
    assert [bucket(n, smallest=6) for n in (1, 6, 7, 13)] == [6, 6, 12, 24]


def test_sampling_keeps_to_the_nucleus_and_its_frequencies():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.log(jnp.tile(jnp.array(probabilities, jnp.float32), (4000, 1)))
    draw = lambda t, p: np.bincount(np.asarray(sample(logits, jax.random.key(0), t, p)), minlength=4) / 4000  # noqa: E731
    np.testing.assert_allclose(draw(1.0, 1.0), probabilities, atol=0.03)
    np.testing.assert_allclose(draw(1.0, 0.7), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(draw(1.0, 0.1), [1, 0, 0, 0])
    np.testing.assert_allclose(draw(0.0, 1.0), [1, 0, 0, 0])
    squared = probabilities**2 / np.sum(probabilities**2)
    np.testing.assert_allclose(draw(0.5, 1.0), squared, atol=0.03)


def test_bad_settings_are_errors():
    config, params, generator = model_of("saisa")
    batch = make_batch(config, LAYOUTS, text_length=16, max_images=2)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        generator(params, batch, 0)
    with pytest.raises(ValueError, match="top_p in"):
        generator(params, batch, 1, Sampling(1.0, 0.0))
