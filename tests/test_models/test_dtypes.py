"""Every dtype on a CPU: reading, decoding and a gradient, for batches of several rows."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saisa_jax.models.layers import for_float32_product
from saisa_jax.models.saisa import Saisa, init_params
from saisa_jax.testing.batches import IMAGE, make_batch
from saisa_jax.testing.configs import tiny_config


@functools.cache
def results(alignment: str, dtype: str) -> tuple[np.ndarray, ...]:
    """Logits of three rows after their prompts and after one more token, and a gradient through all layers."""
    exact = dataclasses.replace(tiny_config(alignment).model_for("finetune"), dtype="float32")
    params = init_params(exact, jax.random.key(0))
    batch = make_batch(exact, [[5, IMAGE, 6, 7], [IMAGE, 8, 9, 4], [3, 4, 5, IMAGE, 6]])
    model = Saisa(dataclasses.replace(exact, dtype=dtype))

    @jax.jit
    def run(params, batch):
        logits, cache = model.apply({"params": params}, batch, 2, method=Saisa.prefill)
        positions = jnp.max(jnp.where(cache.segment_ids > 0, cache.positions, -1), axis=1) + 1
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        after, _ = model.apply({"params": params}, token, positions, cache, method=Saisa.decode)

        def loss(params):
            logits = model.apply({"params": params}, batch)[0][..., : exact.vocab_size]
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

        gradient = jax.grad(loss)(params)["layers"]["attn"]["k_proj"]["kernel"]
        return logits[:, : exact.vocab_size], after[:, : exact.vocab_size], gradient

    return tuple(np.asarray(x, np.float32) for x in run(params, batch))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("alignment", ["saisa", "naavit", "llava"])
def test_16_bits_on_a_cpu(alignment: str, dtype: str) -> None:
    for seen, expected in zip(results(alignment, dtype), results(alignment, "float32"), strict=True):
        # bfloat16 has 8 bits, and its errors add up over the layers.
        assert np.isfinite(seen).all() and np.abs(seen - expected).max() < 0.1 * np.abs(expected).max()


def test_float32_operands_stay_as_they_are() -> None:
    x = jnp.ones(3)
    (same,) = for_float32_product(x)
    program = jax.make_jaxpr(lambda x: for_float32_product(x)[0])(x)
    assert same is x or not program.eqns
