"""Which rows cost least: the cost of any size from a handful of traces."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from saisa_jax import flops
from saisa_jax.config import TRAIN_PROJECTOR, ConfigError
from saisa_jax.planning.rows import RowCost, compare
from saisa_jax.testing.configs import tiny_config


@pytest.mark.parametrize("alignment", ["saisa", "naavit", "llava", "casa"])
def test_the_cost_of_a_row_is_that_of_its_own_trace(alignment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(alignment)
    config = dataclasses.replace(config, finetune=dataclasses.replace(config.finetune, groups=TRAIN_PROJECTOR))
    cost, model = RowCost(config, "finetune"), config.trained_model("finetune")
    text, images = np.array([700, 1, 33, 512]), np.array([5, 1, 0, 7])
    expected = [flops.train_step(model, TRAIN_PROJECTOR, 1, int(t), int(m)) for t, m in zip(text, images, strict=True)]
    traced = []
    monkeypatch.setattr(flops, "train_step", lambda *sizes: traced.append(sizes) or flops.training(*sizes).total)
    assert cost(text, images).tolist() == expected and float(cost(700, 5)) == expected[0]
    assert len(traced) == 6 + 3


def test_the_cheapest_rows_come_first() -> None:
    config = tiny_config()
    counts = np.full(400, 60, np.int32), np.ones(400, np.int32)
    choices = compare(config, "finetune", counts)
    assert [choice.flops_per_sample for choice in choices] == sorted(choice.flops_per_sample for choice in choices)
    best = choices[0]
    assert best.rows * best.max_images >= 400 and 0.5 < best.useful <= 1 and best.token_fill > 0.8
    with pytest.raises(ConfigError, match=r"finetune.sources: no sample can be used"):
        compare(config, "finetune", (counts[0][:0], counts[1][:0]))
