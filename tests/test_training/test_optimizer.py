"""Groups, schedules, AdamW against a step computed by hand, the loss against numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from saisa_jax.config import TRAIN_ALL_BUT_VISION, TRAIN_PROJECTOR, ConfigError, GroupConfig, OptimizerConfig
from saisa_jax.training import optimizer
from saisa_jax.training.loss import cross_entropy

PARAMS = {
    "vision": {"patch_embed": {"kernel": jnp.ones(2)}},
    "visual_proj": {"fc1": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}},
    "layers": {"input_norm": {"scale": jnp.ones(2)}, "attn": {"q_proj": {"kernel": jnp.ones(2)}}},
}


def test_the_first_row_that_matches_decides():
    groups = (("vision/.*", GroupConfig(frozen=True)), (".*norm/.*", GroupConfig()), (".*", GroupConfig(lr_scale=2.0)))
    rows = optimizer.assign_groups(PARAMS, groups)
    assert rows["vision/patch_embed/kernel"] == 0 and rows["layers/input_norm/scale"] == 1
    assert rows["visual_proj/fc1/bias"] == 2


def test_orphans_and_idle_rows_are_errors():
    with pytest.raises(ConfigError, match=r"2 parameters match no row .*layers/input_norm/scale"):
        optimizer.assign_groups(PARAMS, (("vis.*", GroupConfig()),))
    with pytest.raises(ConfigError, match=r"match no parameter: \['visoin/"):
        optimizer.assign_groups(PARAMS, (("visoin/.*", GroupConfig(frozen=True)), (".*", GroupConfig())))


@pytest.mark.parametrize(("groups", "trains"), [(TRAIN_PROJECTOR, {"visual_proj"}), (
    TRAIN_ALL_BUT_VISION, {"visual_proj", "layers"})])  # fmt: skip
def test_stages_train_what_they_should_and_parting_is_undone_by_merging(groups, trains):
    trainable, frozen = optimizer.split(PARAMS, groups)
    assert set(trainable) == trains and set(frozen) == set(PARAMS) - trains
    assert all(leaf.dtype == jnp.bfloat16 for leaf in optimizer.flatten(frozen).values())
    assert all(leaf.dtype == jnp.float32 for leaf in optimizer.flatten(trainable).values())
    assert optimizer.flatten(optimizer.merge(trainable, frozen)).keys() == optimizer.flatten(PARAMS).keys()


def test_schedule_warms_up_and_ends_where_it_should():
    schedule = optimizer.make_schedule(OptimizerConfig(lr=1.0, warmup_fraction=0.1), 100)
    assert float(schedule(0)) == 0.0 and float(schedule(10)) == 1.0
    assert float(schedule(5)) == pytest.approx(0.5)
    assert float(schedule(55)) == pytest.approx(0.5) and float(schedule(100)) == pytest.approx(0.0, abs=1e-6)
    assert float(optimizer.make_schedule(OptimizerConfig(lr=1.0, warmup_fraction=0.03), 110)(3)) == 0.75  # ceil(3.3)
    without = optimizer.make_schedule(OptimizerConfig(lr=1.0, warmup_fraction=0.0, final_lr_fraction=0.1), 10)
    assert float(without(0)) == 1.0 and float(without(10)) == pytest.approx(0.1)


def test_a_step_of_adamw_is_the_one_of_the_books():
    config = OptimizerConfig(
        lr=0.1, schedule="constant", warmup_fraction=0.0, weight_decay=0.5, clip_norm=1e9, b1=0.9, b2=0.99
    )
    groups = (("vision/.*", GroupConfig(lr_scale=0.5)), (".*q_proj.*", GroupConfig(weight_decay=0.0)),
              (".*", GroupConfig()))  # fmt: skip
    adamw = optimizer.make_optimizer(config, groups, PARAMS, 10)
    gradients = optimizer.unflatten({path: jnp.full(2, 3.0) for path in optimizer.flatten(PARAMS)})
    updates, _ = adamw.update(gradients, adamw.init(PARAMS), PARAMS, norm=1.0)
    got = {path: float(leaf[0]) for path, leaf in optimizer.flatten(updates).items()}
    adam = 1.0  # the first step of Adam is sign(gradient)
    assert got["visual_proj/fc1/kernel"] == pytest.approx(-0.1 * (adam + 0.5), rel=1e-5)
    assert got["visual_proj/fc1/bias"] == got["layers/input_norm/scale"] == pytest.approx(-0.1 * adam, rel=1e-5)
    assert got["layers/attn/q_proj/kernel"] == pytest.approx(-0.1 * adam, rel=1e-5)
    assert got["vision/patch_embed/kernel"] == pytest.approx(-0.05 * (adam + 0.5), rel=1e-5)


def test_clipping_is_over_all_that_trains():
    config = OptimizerConfig(lr=1.0, schedule="constant", warmup_fraction=0.0, clip_norm=1.0, b1=0.0, b2=0.0, eps=1.0)
    adamw = optimizer.make_optimizer(config, ((".*", GroupConfig()),), PARAMS, 10)
    gradients = optimizer.unflatten({path: jnp.full(2, 4.0) for path in optimizer.flatten(PARAMS)})
    norm = 4.0 * np.sqrt(10)
    updates, _ = adamw.update(gradients, adamw.init(PARAMS), PARAMS, norm=norm)
    clipped = 4.0 / norm
    assert float(updates["layers"]["input_norm"]["scale"][0]) == pytest.approx(-clipped / (clipped + 1.0), rel=1e-5)


def test_cross_entropy_counts_tokens_and_ignores_the_padded_vocabulary():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 5)).astype(np.float32)
    targets, weights = rng.integers(0, 5, (2, 3)), np.array([[1, 0, 1], [0, 1, 0]], np.float32)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -(np.take_along_axis(log_probabilities, targets[..., None], -1)[..., 0] * weights).sum()
    padded = np.concatenate([logits, np.full((2, 3, 3), -np.inf, np.float32)], axis=-1)
    total, weight = cross_entropy(jnp.array(padded), jnp.array(targets), jnp.array(weights))
    assert float(total) == pytest.approx(expected, rel=1e-6) and float(weight) == 3.0
    zero, nothing = cross_entropy(jnp.array(padded), jnp.array(targets), jnp.zeros((2, 3)))
    assert float(zero) == float(nothing) == 0.0
