"""Bundles of tiny, random models."""

import functools

import jax
import pytest
from PIL import Image

from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.inference.image_cache import ImageCache
from saisa_jax.inference.model import VisionLanguageModel
from saisa_jax.models.saisa import init_params
from saisa_jax.testing.configs import tiny_config


@functools.cache
def shared_model(alignment: str) -> VisionLanguageModel:
    config = tiny_config(alignment)
    params = init_params(config.model_for("finetune"), jax.random.key(1))
    return VisionLanguageModel(params, config, load_tokenizer("easy_vqa"), "finetune", {"stage": "finetune"})


@pytest.fixture
def tiny_model():
    return shared_model


@pytest.fixture(params=["saisa", "naavit", "llava"])
def model(request) -> VisionLanguageModel:
    """With an image cache of its own; programs and parameters are shared."""
    shared = shared_model(request.param)
    own = VisionLanguageModel(
        shared.params, shared.config, shared.tokenizer, shared.stage, shared.metadata, None, ImageCache()
    )
    own.__dict__["generator"] = shared.generator
    return own


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> list[str]:
    directory = tmp_path_factory.mktemp("pictures")
    paths = []
    for n, color in enumerate(("red", "green", "blue")):
        paths.append(str(directory / f"{n}.png"))
        image = Image.new("RGB", (40, 30), color)
        image.paste("white", (5 * n, 5, 5 * n + 12, 20))
        image.save(paths[-1])
    return paths
