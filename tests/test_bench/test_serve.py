"""`bench serve`: what its table is made of."""

from __future__ import annotations

import math

import jax
import pytest

from saisa_jax import __main__ as main
from saisa_jax.bench.serve import DIFFERENT, SAME, bench
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.inference.model import VisionLanguageModel
from saisa_jax.models.saisa import init_params
from saisa_jax.testing.configs import tiny_config


def test_every_load_is_measured() -> None:
    config = tiny_config()
    params = init_params(config.model_for("finetune"), jax.random.key(1))
    model = VisionLanguageModel(params, config, load_tokenizer("easy_vqa"), "finetune", {"stage": "finetune"})
    measured = list(bench(model, (1, 3), rows=2, requests=4, tokens=5))
    assert [(each.clients, each.pictures) for each in measured] == [
        (clients, kind) for kind in (SAME, DIFFERENT) for clients in (0, 1, 3)
    ]
    for each in measured:
        assert each.requests > 0 and math.isclose(each.tokens, 5 * each.requests)
        assert math.isnan(each.first) if not each.clients else 0 < each.first <= each.slowest


@pytest.mark.parametrize("flag", ["--rows=0", "--clients=0", "--clients=a", "--tokens=0"])
def test_flags_that_cannot_be(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["bench", "serve", "--checkpoint=none", flag]) == 2
    assert flag in capsys.readouterr().err
