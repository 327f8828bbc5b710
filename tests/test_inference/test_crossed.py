"""Flamingo with local text answers: a conversation's cache changes no token, and pictures are kept as they are."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.inference.chat import Chat
from saisa_jax.inference.image_cache import ImageCache
from saisa_jax.inference.model import VisionLanguageModel
from saisa_jax.models.saisa import init_params
from saisa_jax.testing.configs import tiny_config
from saisa_jax.testing.gates import with_open_gates


@pytest.fixture(scope="module")
def crossed() -> VisionLanguageModel:
    config = tiny_config("casa")
    params = with_open_gates(init_params(config.model_for("finetune"), jax.random.key(1)))
    tokenizer = load_tokenizer("easy_vqa")
    return VisionLanguageModel(params, config, tokenizer, "finetune", {"stage": "finetune"}, None, ImageCache())


def test_later_turns_and_later_pictures_read_only_what_is_new(
    crossed: VisionLanguageModel, pictures: list[str]
) -> None:
    chat = Chat(crossed)
    chat.add_image(pictures[0])
    asked = ("what color is the shape?", None), ("is it red?", None), ("is it blue?", pictures[1])
    for question, picture in asked:
        if picture is not None:
            chat.add_image(picture)
        other = Chat(crossed, list(chat.turns), list(chat.images), _pending=list(chat._pending))
        expected = "".join(other.ask(question, 4))
        assert "".join(chat.ask(question, 4)) == expected
    assert chat.reused > 0


def test_what_is_kept_of_a_picture_and_what_an_answer_read_of_it(
    crossed: VisionLanguageModel, pictures: list[str]
) -> None:
    (image,), (again,) = (crossed.encode_images(pictures[:1]) for _ in range(2))
    assert again.kv is image.kv and crossed.image_cache.hits > 0
    c = crossed.model_config
    assert image.kv is not None
    assert image.kv.k.shape == (len(c.cross_layers), 1, c.num_kv_heads, c.num_visual_tokens, c.head_dim)
    weights = np.asarray(crossed.attention("is it red?", pictures[:1]))
    assert weights.shape == (c.num_layers, c.num_visual_tokens)
    assert (weights.sum(axis=1) > 0).all() and (weights.sum(axis=1) < 1).all()
