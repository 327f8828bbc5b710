"""Every dtype computes on every platform: a CPU as well, where XLA has no product of 16-bit numbers into float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saisa_jax.config import ModelConfig, ProjectorConfig
from saisa_jax.models.saisa import Saisa, init_params
from saisa_jax.testing.batches import IMAGE, make_batch
from saisa_jax.testing.configs import tiny_config

LAYOUTS = ([5, IMAGE, 6, 7, 8], [9, 10, 11, IMAGE, 12, 13])
TOLERANCE = {"bfloat16": 0.1, "float16": 0.02}  # of the largest logit: 8 and 11 bits, through two layers


def model_of(alignment: str, **changes) -> ModelConfig:
    sharing = "per_layer" if alignment == "saisa" else "shared"
    return dataclasses.replace(
        tiny_config().model, alignment=alignment, projector=ProjectorConfig(sharing=sharing), **changes
    )


def computed(config: ModelConfig, params, batch):
    """Logits of whole rows, of the prefill's last tokens; the gradient of a loss."""
    model = Saisa(config)

    def loss(params):
        logits, _ = model.apply({"params": params}, batch)
        return -jnp.mean(jax.nn.log_softmax(logits[:, :, : config.vocab_size])[:, :, 3]), logits

    gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(params)

    last, _ = jax.jit(lambda params: model.apply({"params": params}, batch, 16, method="prefill"))(params)
    return logits, last, gradient


@functools.cache
def in_float32(alignment: str):
    config = model_of(alignment, tie_embeddings=alignment == "llava")
    params = init_params(config, jax.random.key(0))
    batch = make_batch(config, LAYOUTS)
    return config, params, batch, computed(config, params, batch)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("alignment", ["saisa", "naavit", "llava"])
def test_16_bit_numbers_compute_as_float32_does(alignment, dtype):
    config, params, batch, expected = in_float32(alignment)
    narrow = jax.tree.map(lambda x: x.astype(dtype), params)
    got = computed(dataclasses.replace(config, dtype=dtype), narrow, batch)
    for ours, theirs in zip(got, expected, strict=True):  # logits, last logits, all gradients: each on its own scale
        ours, theirs = (
            jnp.concatenate([jnp.ravel(x).astype("float32") for x in jax.tree.leaves(y)]) for y in (ours, theirs)
        )
        finite = np.isfinite(theirs)
        assert np.isfinite(ours[finite]).all()
        scale = np.abs(theirs[finite]).max()
        np.testing.assert_allclose(ours[finite], theirs[finite], atol=TOLERANCE[dtype] * scale)
