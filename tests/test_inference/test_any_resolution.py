"""Pictures of several views: the same answers in any batch, by chat, evaluation and server; a cache entry each."""

from __future__ import annotations

import base64
import dataclasses
import functools
import queue
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from saisa_jax.config import Config
from saisa_jax.data.rows.collate import Example, pack_rows
from saisa_jax.data.sample import ASSISTANT, USER, DataError, Turn
from saisa_jax.data.text.conversation import encode
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.data.views import prepare_views
from saisa_jax.inference.batches import make_prompt, plan_batches
from saisa_jax.inference.image_cache import ImageCache
from saisa_jax.inference.model import Conversation, VisionLanguageModel
from saisa_jax.models.saisa import Saisa, init_params
from saisa_jax.serving.engine import Engine
from saisa_jax.serving.pictures import PictureLimits, read_picture
from saisa_jax.serving.questions import Ended, Question, Said
from saisa_jax.testing.configs import tiny_config

QUESTIONS = ["what color is the shape?", "is it red?", "what is in <image> and what in <image>?", "is there a circle?"]
VIEWS = [4, 5, 3]  # of the pictures


def config_of(alignment: str) -> Config:
    config = tiny_config(alignment)
    vision = dataclasses.replace(config.model.vision, image_mode="anyres")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vision=vision, max_length=256))


@functools.cache
def shared(alignment: str) -> VisionLanguageModel:
    config = config_of(alignment)
    params = init_params(config.model_for("finetune"), jax.random.key(1))
    return VisionLanguageModel(params, config, load_tokenizer("easy_vqa"), "finetune", {"stage": "finetune"})


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("llava", "casa")]


@pytest.fixture(params=["saisa", *SLOW])
def model(request) -> VisionLanguageModel:
    own = dataclasses.replace(shared(request.param), image_cache=ImageCache())
    own.__dict__["generator"] = shared(request.param).generator
    return own


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    folder, paths = tmp_path_factory.mktemp("pictures"), []
    for n, (width, height) in enumerate([(120, 30), (64, 70), (40, 80)]):
        pixels = np.random.default_rng(n).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
        paths.append(str(folder / f"{n}.png"))
    return paths


def images_for(pictures: list[str]) -> list[list[str]]:
    return [[pictures[0]], [], [pictures[1], pictures[2]], [pictures[2]]]


def test_answers_do_not_depend_on_the_batch_or_the_cache(model, pictures) -> None:
    assert model.views_of(pictures) == VIEWS
    images = images_for(pictures)
    together = model.generate(QUESTIONS, images, max_new_tokens=6)
    kept = 0 if model.model_config.alignment == "llava" else sum(VIEWS)
    assert len(model.image_cache) == kept, "an entry for each view"
    misses = model.image_cache.misses
    alone = [model.generate([q], [i], max_new_tokens=6)[0] for q, i in zip(QUESTIONS, images, strict=True)]
    assert together == alone and len(set(together)) > 1 and model.image_cache.misses == misses
    handles = model.encode_images(pictures)
    assert [len(handle.views) for handle in handles] == VIEWS == model.views_of(handles)
    handled = [[handles[0]], [], [handles[1], handles[2]], [Image.open(pictures[2])]]
    assert model.generate(QUESTIONS, handled, max_new_tokens=6) == together
    other = dataclasses.replace(model, params=jax.tree.map(lambda x: x + 0, model.params))
    assert other.generate(QUESTIONS, handled, max_new_tokens=6) == together, "encoded anew, with all views"


@pytest.mark.slow
def test_a_chat_and_batches_of_an_evaluation_answer_alike(model, pictures) -> None:
    expected = model.generate(QUESTIONS, images_for(pictures), max_new_tokens=6)
    chat = model.chat()
    chat.add_image(pictures[0])
    assert "".join(chat.ask(QUESTIONS[0], 6)).strip() == expected[0]
    asked = [*chat.turns, Turn(USER, "<image> and now?")]
    chat.add_image(pictures[1])
    said = "".join(chat.ask("and now?", 6)).strip()
    asked[-1] = dataclasses.replace(asked[-1], text="<image>\nand now?")
    (again,) = model.answer([Conversation(tuple(asked), tuple(pictures[:2]))], 6)
    assert said == again and len(chat.images) == 2

    prompts = [
        make_prompt(model, Conversation((Turn(USER, q),), tuple(i)), 6)
        for q, i in zip(QUESTIONS, images_for(pictures), strict=True)
    ]
    assert [len(prompt.keys) for prompt in prompts] == [4, 0, 8, 3]
    found: dict[int, str] = {}
    batches = plan_batches(prompts, 2)
    for numbers, answers in zip(batches, model.answer_batches(prompts, batches, 6), strict=True):
        found |= {n: model.text(tokens) for n, tokens in zip(numbers, answers, strict=True) if n is not None}
    assert [found[n] for n in range(4)] == expected


@pytest.mark.slow
def test_a_server_answers_alike(pictures) -> None:
    model = shared("saisa")
    engine = Engine(model, rows=2, max_images=1)
    assert engine.max_images == 5, "one picture has up to so many views"
    engine.start()
    engine.ready.wait()
    url = "data:image/png;base64," + base64.b64encode(Path(pictures[1]).read_bytes()).decode()
    image = read_picture(model, url, PictureLimits(), "picture 1")
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
    engine.submit(Question(model.request((Turn(USER, QUESTIONS[0]),), [image], 6), 6), heard.put)
    words = []
    while not isinstance(event := heard.get(timeout=60), Ended):
        assert isinstance(event, Said)
        words.append(event.text)
    engine.drain()
    engine.join(60)
    assert "".join(words).strip() == model.generate(QUESTIONS[0], pictures[1], max_new_tokens=6)


@pytest.mark.parametrize("alignment", ["saisa", *SLOW, pytest.param("naavit", marks=pytest.mark.slow)])
def test_packed_is_single_with_gradients(alignment: str, pictures) -> None:
    """Samples of several pictures share a row, and each has the logits and gradients that it has alone."""
    model = shared(alignment)
    config = model.model_config
    examples = []
    for paths, answer in ((pictures[:1], "red"), (pictures[1:], "no it is blue"), ([], "a circle")):
        views = [prepare_views(Image.open(path), config.vision) for path in paths]
        turns = (Turn(USER, "what is it?"), Turn(ASSISTANT, answer))
        encoded = encode(
            turns, "vicuna_v1", model.tokenizer, config.num_visual_tokens, system_prompt="", num_images=len(paths),
            views=list(map(len, views)),
        )  # fmt: skip
        examples.append(Example(encoded, [view for of_image in views for view in of_image]))
    rows = [
        pack_rows([some], 96, 12, config.vision.image_size)
        for some in ([examples[0]], [examples[1]], [examples[2]], examples)
    ]

    @jax.jit
    def run(params: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            logits, _ = Saisa(config).apply({"params": params}, batch)
            nll = -jax.nn.log_softmax(logits)
            picked = jax.numpy.take_along_axis(nll, batch["targets"][..., None], axis=-1)[..., 0]
            return jax.numpy.sum(picked * batch["loss_weights"]), logits

        return jax.grad(loss, has_aux=True)(params)

    found = [run(model.params, row) for row in rows]
    whole, at = np.asarray(found[3][1][0]), 0
    inside = slice(config.vocab_size)
    for example, (_, logits) in zip(examples, found[:3], strict=True):
        length = len(example.encoded.tokens)
        np.testing.assert_allclose(whole[at : at + length, inside], logits[0, :length, inside], atol=2e-5)
        at += length
    parts = jax.tree.map(lambda *leaves: sum(leaves), *(grads for grads, _ in found[:3]))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4), found[3][0], parts)
    if alignment != "casa":  # whose gates are shut at first
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found[0][0]["vision"]))


@pytest.mark.slow
def test_a_picture_that_cannot_be_read_names_itself(pictures, tmp_path) -> None:
    model = shared("saisa")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"cannot read .*bad.png"):
        make_prompt(model, Conversation((Turn(USER, "what?"),), (str(tmp_path / "bad.png"),)), 6)
    half = Path(pictures[1]).read_bytes()[:4000]
    (tmp_path / "half.png").write_bytes(half)
    good, broken = (
        make_prompt(model, Conversation((Turn(USER, QUESTIONS[0]),), (path,)), 4)
        for path in (pictures[1], str(tmp_path / "half.png"))
    )
    ((one, other),) = model.answer_batches([good, broken], [[0, 1]], 4)
    assert isinstance(other, DataError) and "half.png" in str(other)
    assert model.text(one) == model.generate(QUESTIONS[0], pictures[1], max_new_tokens=4)
