"""A tiny model and one engine for it, whose programs all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
import pytest
from PIL import Image

from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.inference.model import VisionLanguageModel
from saisa_jax.models.saisa import init_params
from saisa_jax.serving.engine import Engine
from saisa_jax.testing.configs import tiny_config


@pytest.fixture(scope="session")
def model() -> VisionLanguageModel:
    """Random, with logits so far apart that greedy answers do not repeat one token."""
    config = tiny_config("saisa")
    params = init_params(config.model_for("finetune"), jax.random.key(1))
    params = jax.tree.map(lambda x: x * 1.5 if x.ndim > 1 else x, params)
    return VisionLanguageModel(params, config, load_tokenizer("easy_vqa"), "finetune", {"stage": "finetune"})


@pytest.fixture(scope="session")
def engine(model: VisionLanguageModel) -> Iterator[Engine]:
    """Three rows, two levels."""
    engine = Engine(model, rows=3, max_images=2, pieces=(8, 16))
    engine.start()
    assert engine.ready.wait(300)
    yield engine
    engine.drain()
    engine.join(60)
    assert not engine.alive


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)) for _ in range(4)]
