"""A projector of one's own is one file: it trains, and what is cached of an image is what training computes."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saisa_jax.config import ModelConfig, ProjectorConfig
from saisa_jax.models.projectors import PROJECTORS
from saisa_jax.models.saisa import Saisa, init_params
from saisa_jax.registry import UnknownNameError
from saisa_jax.testing.batches import IMAGE, make_batch
from saisa_jax.testing.configs import tiny_config

GATED = '''
import flax.linen as nn
import jax.numpy as jnp

from saisa_jax.models.layers import dense
from saisa_jax.models.projectors import PROJECTORS
from saisa_jax.models.projectors.mlp import MLPProjector


@PROJECTORS.register("gated")
class GatedProjector(nn.Module):
    """MLP(Z) * sigmoid(W Z)."""

    config: object

    @nn.compact
    def __call__(self, features):
        c = self.config
        gate = dense(c.embed_dim, ("vision_embed", None), name="gate", param_dtype=jnp.dtype(c.param_dtype))
        return MLPProjector(c, name="mlp")(features) * nn.sigmoid(gate(features))
'''


@pytest.fixture
def gated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PROJECTORS, "_entries", dict(PROJECTORS))
    (tmp_path / "gated.py").write_text(GATED)
    runpy.run_path(str(tmp_path / "gated.py"))


def model(sharing: str) -> ModelConfig:
    return dataclasses.replace(tiny_config().model, projector=ProjectorConfig("gated", sharing=sharing))


@pytest.mark.parametrize("sharing", ["per_layer", "shared"])
def test_a_projector_of_ones_own(gated: None, sharing: str) -> None:
    config = model(sharing)
    params = init_params(config, jax.random.key(0))
    stack = params["layers"]["visual_proj"] if sharing == "per_layer" else params["visual_proj"]
    layers = (config.num_layers,) if sharing == "per_layer" else ()
    assert stack["gate"]["kernel"].shape == (*layers, config.vision.embed_dim, config.embed_dim)

    batch = make_batch(config, [[5, IMAGE, 6, 7], [IMAGE, 3, 9, 4]])
    loss = lambda p: jnp.sum(Saisa(config).apply({"params": p}, batch)[0][..., : config.vocab_size] ** 2)  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(params)
    of_gate = (gradient["layers"] if sharing == "per_layer" else gradient)["visual_proj"]["gate"]["kernel"]
    assert np.abs(of_gate).max() > 0

    apply = lambda *args, **kwargs: Saisa(config).apply({"params": params}, *args, **kwargs)  # noqa: E731
    whole = apply(batch)[0]
    last, _ = apply(batch, 0, method=Saisa.prefill)  # reads the image through its cached keys and values
    ends = (batch["segment_ids"] > 0).sum(axis=1) - 1
    inside = slice(config.vocab_size)
    np.testing.assert_allclose(last[:, inside], whole[np.arange(2), ends][:, inside], atol=1e-5)


def test_the_kinds_there_are() -> None:
    assert "mlp" in PROJECTORS and "gated" not in PROJECTORS
    with pytest.raises(UnknownNameError, match=r"model.projector.kind='mpl' is not one of .*did you mean mlp"):
        init_params(dataclasses.replace(tiny_config().model, projector=ProjectorConfig("mpl")), jax.random.key(0))
