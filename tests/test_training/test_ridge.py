"""Projectors in closed form: against least squares, streamed, on a mesh, of few pictures."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saisa_jax import parallel
from saisa_jax.config import Config, ConfigError, DistillConfig, MeshConfig, ModelConfig
from saisa_jax.models.projectors.low_rank import LowRankProjector
from saisa_jax.models.saisa import Saisa, init_params
from saisa_jax.testing.batches import make_batch, random_layout
from saisa_jax.testing.configs import tiny_config
from saisa_jax.training import ridge
from saisa_jax.training.ridge import Moments, fit

LLAVA = tiny_config("llava").model
RIDGE = 1e-2


def config_of(kind: str, **changes) -> Config:
    base = tiny_config("saisa" if kind == "mlp" else kind)
    projector = dataclasses.replace(base.model.projector, **changes)
    distill = DistillConfig(teacher="somewhere", ridge=RIDGE)
    return dataclasses.replace(
        base, stages=("finetune",), model=dataclasses.replace(base.model, projector=projector), distill=distill
    )


@functools.cache
def params():
    return jax.jit(functools.partial(init_params, LLAVA))(jax.random.key(5))


@functools.cache
def batches():
    """Rows with no, one and two images in their two slots."""
    rng = np.random.default_rng(0)
    layouts = lambda: [random_layout(rng, 9, i % 3, 100) for i in range(8)]  # noqa: E731
    return [make_batch(LLAVA, layouts(), max_images=2, seed=seed) for seed in range(2)]


def moments_of(model: ModelConfig, sizes=(1, 1, 1)) -> list[Moments]:
    mesh = parallel.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    sums = None
    with parallel.use(mesh, parallel.make_rules(LLAVA, mesh)):
        for batch in batches():
            found = ridge.sums_of_batch(LLAVA, model, mesh, params(), parallel.to_device(batch, mesh))
            with jax.enable_x64(True):
                sums = ridge.add_sums(sums, found)
        assert sums.xx.dtype == "float64"
        return list(ridge._layers(sums, mesh))


@functools.cache
def states() -> tuple[np.ndarray, np.ndarray]:
    """Features [n, C] of the images that are there, and the teacher's states of their tokens [1 + L, n, D], float64."""
    apply = jax.jit(
        lambda params, batch: Saisa(LLAVA).apply({"params": params}, batch, capture=("features", "hidden"))[1]
    )
    features, tokens = [], []
    for batch in batches():
        aux = apply(params(), batch)
        held = np.repeat(batch["image_segment_ids"] > 0, LLAVA.num_visual_tokens, axis=1)
        features.append(np.asarray(aux["features"], np.float64)[held])
        tokens.append(np.asarray(aux["visual_hidden"], np.float64)[:, held])
    return np.concatenate(features), np.concatenate(tokens, axis=1)


def least_squares(x: np.ndarray, r: np.ndarray, w: np.ndarray, penalty: float, bias: bool) -> np.ndarray:
    """numpy's, with a row for each penalised unknown."""
    inputs, width = (np.concatenate([x, np.ones((len(x), 1))], axis=1) if bias else x), x.shape[1]
    mean = (w @ x) / w.sum() if bias else 0.0
    size = np.sum(w[:, None] * (x - mean) ** 2) / width
    rows = np.sqrt(penalty * size) * np.eye(width, inputs.shape[1])
    left = np.concatenate([np.sqrt(w)[:, None] * inputs, rows])
    right = np.concatenate([np.sqrt(w)[:, None] * r, np.zeros((width, r.shape[1]))])
    return np.linalg.lstsq(left, right, rcond=None)[0]


def weights_of(y: np.ndarray) -> np.ndarray:
    return 1 / (np.mean(y**2, axis=1) + LLAVA.norm_eps)


@pytest.mark.parametrize("sizes", [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.multi_device)])
def test_a_fit_is_the_least_squares_solution(sizes):
    config, (features, tokens) = config_of("mlp"), states()
    fc1, fc2 = (
        jax.tree.map(lambda x: np.asarray(x, np.float64), params()["visual_proj"][name]) for name in ("fc1", "fc2")
    )
    hidden = features @ fc1["kernel"] + fc1["bias"]
    hidden = np.asarray(jax.nn.gelu(hidden.astype(np.float32), approximate=False), np.float64)
    for layer, sums in enumerate(moments_of(config.model, sizes)):
        y, found = tokens[layer], fit(config, layer, sums)
        expected = least_squares(hidden, y - tokens[0], weights_of(y), RIDGE, bias=True)
        got = found.params["fc2"]
        np.testing.assert_allclose(got["kernel"], expected[:-1], atol=1e-4 * max(1e-2, np.abs(expected).max()))
        np.testing.assert_allclose(got["bias"], expected[-1], atol=1e-4 * max(1e-2, np.abs(expected).max()))
        assert int(sums.tokens) == len(y) == sum((b["image_segment_ids"] > 0).sum() for b in batches()) * 16
        # What is said of the errors is what the projectors do.
        w, out = weights_of(y), hidden @ (fc2["kernel"] + got["kernel"]) + fc2["bias"] + got["bias"]
        error = np.sqrt(np.sum(w[:, None] * (out - y) ** 2) / np.sum(w[:, None] * y**2))
        assert found.fitted == pytest.approx(error, abs=1e-4) and (layer == 0 or found.fitted < 0.9 * found.copied)


def test_low_rank_parts_are_the_best_of_their_rank():
    config, (_, tokens) = config_of("low_rank", rank=9), states()
    sums, y, e = moments_of(config.model)[1], tokens[1], tokens[0]
    full = least_squares(e, y - e, weights_of(y), RIDGE, bias=False)
    found = fit(config, 1, sums)
    down, up = found.params["down"]["kernel"], found.params["up"]["kernel"]
    assert down.shape == (32, 9) and up.shape == (9, 32) and not up[8].any() and down[:, 8].any()
    np.testing.assert_allclose(down[:, 4:8], -down[:, :4])
    # The module computes the linear map of rank 4 ...
    module = LowRankProjector(config.model)
    got = module.apply({"params": found.params}, jnp.asarray(e[None], jnp.float32))[0]
    low = e + e @ down[:, :4] @ up[:4]
    np.testing.assert_allclose(got, low, atol=1e-4)
    # ... which keeps what is largest of the full one, as seen through the penalised data.
    x = np.concatenate([np.sqrt(weights_of(y))[:, None] * e, np.sqrt(RIDGE * np.trace(sums.xx) / 32) * np.eye(32)])
    u, s, v = np.linalg.svd(x @ full)
    np.testing.assert_allclose(x @ down[:, :4] @ up[:4], (u[:, :4] * s[:4]) @ v[:4], atol=1e-3)
    whole = fit(config_of("low_rank", rank=64), 1, sums).params
    np.testing.assert_allclose(whole["down"]["kernel"][:, :32] @ whole["up"]["kernel"][:32], full, atol=1e-3)
    assert found.fitted < found.copied


def test_few_tokens_leave_the_connector_where_they_say_nothing(caplog):
    config, rng = config_of("mlp"), np.random.default_rng(0)
    x, r = rng.normal(size=(3, 32)), rng.normal(size=(3, 32))
    sums = Moments(x.T @ x, x.T @ r, x.sum(0), r.sum(0), 3.0, np.sum(r**2), 10 * np.sum(r**2), 3)
    kernel = fit(config, 0, sums).params["fc2"]["kernel"]
    unseen = np.linalg.svd(x - x.mean(0))[2][2:]  # directions in which the three do not differ
    assert np.isfinite(kernel).all() and np.abs(unseen @ kernel).max() < 1e-6 < np.abs(kernel).max()
    alike = np.ones((3, 32))
    same = Moments(alike.T @ alike, alike.T @ r, alike.sum(0), r.sum(0), 3.0, 1.0, 1.0, 3)
    with pytest.raises(ConfigError, match=r"layer 7 cannot be fitted \(nothing varies\).*--config.distill.start=copy"):
        fit(config, 7, same)
    with pytest.raises(ConfigError, match=r"without a picture: name sources with pictures, .*distill.start=copy"):
        ridge._tell_of_few(config, 0, 32)
    with caplog.at_level("WARNING"):
        ridge._tell_of_few(config, 48, 32)
    assert "32 inputs are fitted to 48 visual tokens alone" in caplog.text
