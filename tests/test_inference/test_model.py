"""Requests of any mixture: batch == single, cached == uncached, buckets reused, bad ones named, others unharmed."""

import base64
import dataclasses
import io
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from PIL import Image

from saisa_jax import parallel
from saisa_jax.checkpoints import save_model
from saisa_jax.config import ConfigError, MeshConfig
from saisa_jax.data.sample import USER, DataError, Turn
from saisa_jax.inference.image_cache import EncodedImage, ImageCache
from saisa_jax.inference.model import Conversation, Request, VisionLanguageModel, load
from saisa_jax.models.kv_cache import ImageKV
from saisa_jax.testing.programs import compilations

QUESTIONS = [
    "what color is the shape?",
    "is there a circle?",
    "what is in <image> and what is in <image>? is it the same?",
    "what shape is in the image?",
]


def images_for(pictures: list[str]) -> list[list[str]]:
    return [[pictures[0]], [], [pictures[1], pictures[0]], [pictures[2]]]


def test_a_mixed_batch_gives_what_each_question_gives_alone(model, pictures):
    images = images_for(pictures)
    together = model.generate(QUESTIONS, images, max_new_tokens=6)
    alone = [model.generate([q], [i], max_new_tokens=6)[0] for q, i in zip(QUESTIONS, images, strict=True)]
    assert together == alone
    assert len(set(together)) > 1
    handles = model.encode_images(pictures)
    handled = [[handles[0]], [], [handles[1], handles[0]], [Image.open(pictures[2])]]
    assert model.generate(QUESTIONS, handled, max_new_tokens=6) == together


def test_a_handle_of_another_model_is_encoded_anew(tiny_model, pictures):
    one, other = tiny_model("saisa"), tiny_model("naavit")
    (handle,) = one.encode_images(pictures[:1])
    asked = ([QUESTIONS[0]], [[handle]], 4)
    assert other.generate(*asked) == other.generate([QUESTIONS[0]], [[pictures[0]]], 4)
    assert one.encode_images([handle])[0] is handle
    rounded = dataclasses.replace(one, params=jax.tree.map(lambda x: x.astype("bfloat16").astype(x.dtype), one.params))
    assert rounded.encode_images(pictures[:1])[0].kv is not handle.kv  # although it shares the cache


def test_encoded_images_give_the_logits_of_new_ones(model, pictures):
    images = images_for(pictures)
    asked = [Conversation((Turn(USER, q),), tuple(i)) for q, i in zip(QUESTIONS, images, strict=True)]
    requests = model._requests(asked, 4)
    slots = model.image_slots(model.batch(requests), requests)
    anew = [Request(r.encoded, tuple(dataclasses.replace(i, kv=None) for i in r.images)) for r in requests]
    batch = model.batch(anew)
    assert batch["images"].size and (slots is None or not model.batch(requests)["images"].size)
    fresh, cache, positions = model.generator.prefill(model.params, batch, 16)
    if model.model_config.alignment == "llava":
        assert slots is None and all(image.kv is None for image in model.encode_images(pictures))
        return
    cached, cache_of_cached, positions_of_cached = model.generator.prefill(model.params, batch, 16, slots)
    np.testing.assert_array_equal(positions, positions_of_cached)
    inside = slice(model.model_config.vocab_size)
    np.testing.assert_allclose(cached[:, inside], fresh[:, inside], atol=1e-5)
    used = np.asarray(cache.visual.segment_ids)[None, :, None, :, None] > 0
    for one, other in zip(cache.visual[:2], cache_of_cached.visual[:2], strict=True):
        np.testing.assert_allclose(one * used, other * used, atol=1e-5)


def test_an_image_is_encoded_once_whatever_it_comes_from(model, pictures):
    content = Path(pictures[0]).read_bytes()
    model.generate([QUESTIONS[0]], [[pictures[0]]], max_new_tokens=2)
    model.generate([QUESTIONS[3]], [[content]], max_new_tokens=2)
    model.generate([QUESTIONS[3]], [[Image.open(pictures[0])]], max_new_tokens=2)
    if model.model_config.alignment == "llava":  # its visual tokens depend on the prompt: there is nothing to keep
        assert (model.image_cache.misses, model.image_cache.hits, model.image_cache.nbytes) == (0, 0, 0)
        return
    assert (model.image_cache.misses, model.image_cache.hits) == (1, 2)
    c = model.model_config
    one = 2 * c.num_layers * c.num_kv_heads * c.vision.num_patches * c.head_dim * 4
    assert model.image_cache.nbytes == one


def test_a_second_batch_of_a_like_size_compiles_nothing(model, pictures):
    images = images_for(pictures)
    model.generate(QUESTIONS, images, max_new_tokens=6)
    with compilations() as seen:
        model.generate(QUESTIONS[::-1], images[::-1], max_new_tokens=9)
        model.generate(["is it red?", *QUESTIONS[:3]], [[pictures[2]], *images[:3]], max_new_tokens=3, temperature=1.0)
    assert seen == []
    with compilations() as seen:
        model.generate(QUESTIONS * 5, images * 5, max_new_tokens=6)
    assert seen  # the counter counts


def test_bad_requests_are_all_named_and_harm_no_other(model, pictures, tmp_path):
    broken, huge = tmp_path / "broken.png", tmp_path / "huge.png"
    broken.write_bytes(Path(pictures[0]).read_bytes()[:60])
    Image.new("1", (10_000, 10_000)).save(huge)
    questions = [
        QUESTIONS[0],
        "what?",
        "<image> <image> what?",
        " ",
        "is it red? " * 80,
        "what?",
        QUESTIONS[1],
    ]
    images = [[pictures[0]], [str(broken)], [pictures[0]], [], [], [str(huge)], []]
    reasons = {
        1: "cannot read",
        2: "2 <image> placeholder",
        3: "empty: ask something",
        4: "model.max_length",
        5: "10000 x 10000 pixels",
    }
    out = model.generate(questions, images, max_new_tokens=3, on_error="return")
    for number, reason in reasons.items():
        assert isinstance(out[number], DataError) and reason in str(out[number])
        assert f"question {number}" in str(out[number])
    good = model.generate([questions[0], questions[6]], [images[0], []], max_new_tokens=3)
    assert [out[0], out[6]] == good
    with pytest.raises(DataError, match="5 of 7 questions cannot be answered") as error:
        model.generate(questions, images, max_new_tokens=3)
    assert all(reason in str(error.value) for reason in reasons.values())
    with pytest.raises(DataError, match=r"leaves no room for 100 new tokens.*model.max_length=128"):
        model.generate([QUESTIONS[0]], [[]], max_new_tokens=100)
    assert model.generate([QUESTIONS[1]], max_new_tokens=3) == good[1:]
    assert len(repr(model.encode_images(pictures[:1]))) < 120
    with pytest.raises(DataError, match="2 questions came with 1 lists"):
        model.generate(["a", "b"], [[]])
    with pytest.raises(DataError, match="a list of images for each"):
        model.generate(["a"], [pictures[0]])
    with pytest.raises(ValueError, match="on_error"):
        model.generate(["a"], [[]], on_error="ignore")


def test_one_question_needs_no_lists_and_takes_any_picture(tiny_model, pictures):
    model, question = tiny_model("saisa"), QUESTIONS[0]
    (expected,) = model.generate([question], [[pictures[0]]], max_new_tokens=4)
    content = Path(pictures[0]).read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    array = np.asarray(Image.open(pictures[0]))
    with open(pictures[0], "rb") as file:
        for image in (pictures[0], Path(pictures[0]), content, bytearray(content), url, array, file, file):
            assert model.generate(question, image, max_new_tokens=4) == expected, type(image)
    assert model.generate(question, [array], max_new_tokens=4) == expected
    assert isinstance(model.generate(question, max_new_tokens=2), str)
    chat = model.chat()
    chat.add_image(array)
    assert "".join(chat.ask(question, max_new_tokens=4)) == expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((3,), "this is a int"),
        (([{"role": "user", "content": "a"}],), "this is a dict"),
        (([],), "no questions"),
        ((["a", "b"], "a.png"), "a list of images for each"),
        (("a", 7), "an image is a path.*this is a int"),
        (("a", np.full((4, 5, 3), 9.0, np.float32)), r"in floats is in 0\.\.1.*float32 \[4, 5, 3\]"),
        (("a", np.zeros((4, 4), np.uint8)), r"not uint8 \[4, 4\]"),
        (("a", "https://example.org/a.png"), "is a URL, and nothing is fetched"),
        (("a", "data:image/png,abc"), "not in base64"),
        (("a", io.StringIO("text")), "opened for bytes"),
    ],
)
def test_other_types_get_one_clear_error(asked, message, tiny_model):
    with pytest.raises(DataError, match=message):
        tiny_model("saisa").generate(*asked)


def test_a_model_of_several_processes_is_evaluated_and_not_asked(tiny_model):
    device = lambda number: mock.Mock(process_index=number)  # noqa: E731
    mesh = mock.Mock(spec=Mesh, devices=np.array([device(0), device(1)]), shape={"data": 1, "fsdp": 1, "tensor": 2})
    model = dataclasses.replace(tiny_model("saisa"), mesh=mesh)
    for ask in (lambda: model.generate("is there a circle?"), model.chat, lambda: model.encode_images(["a.png"])):
        with pytest.raises(ConfigError, match=r"runs in one process, and 2 hold this model: evaluate it with eval\.py"):
            ask()


def test_a_fresh_picture_beside_encoded_ones_is_encoded_with_its_batch(tiny_model, pictures):
    model = tiny_model("saisa")
    handles = model.encode_images(pictures[:2])
    fresh = dataclasses.replace(handles[1], kv=None)
    mixed = [model.request((Turn(USER, QUESTIONS[0]),), [image]) for image in (handles[0], fresh)]
    batch = model.batch(mixed)
    assert (
        batch["images"].any(axis=(1, 2, 3, 4)).tolist()[:2] == [True, True] and model.image_slots(batch, mixed) is None
    )


def test_threads_share_the_image_cache():
    cache = ImageCache(max_bytes=300)
    half = np.zeros((1, 1, 1, 25, 1), np.float16)
    images = [EncodedImage(str(n), np.zeros((2, 2, 3), np.uint8), ImageKV(half, half)) for n in range(8)]

    def work(seed: int) -> None:
        for n in np.random.default_rng(seed).integers(0, 8, 3000):
            if cache.get(str(n)) is None:
                cache.put(images[n])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert len(cache) == 3 and cache.nbytes == 300 and cache.hits + cache.misses == 24_000


def test_the_cache_keeps_what_was_used_last_within_its_bytes():
    def image(key: str, size: int = 25) -> EncodedImage:
        half = np.zeros((1, 1, 1, size, 1), np.float16)
        return EncodedImage(key, np.zeros((2, 2, 3), np.uint8), ImageKV(half, half))

    cache = ImageCache(max_bytes=250)
    for key in "abc":
        cache.put(image(key))  # 100 bytes each
    assert (len(cache), cache.nbytes) == (2, 200)
    assert cache.get("a") is None and cache.get("b") is not None
    cache.put(image("d"))
    assert cache.get("c") is None and cache.get("b") is not None
    cache.put(image("b", 50))
    assert (len(cache), cache.nbytes) == (1, 200)
    cache.put(image("e", 100))
    assert cache.get("e") is None and len(cache) == 1


@pytest.mark.multi_device
@pytest.mark.parametrize("alignment", ["saisa", "llava"])
def test_load_spreads_a_model_over_a_mesh_and_casts_it(alignment, tiny_model, pictures, tmp_path):
    whole = tiny_model(alignment)
    save_model(tmp_path / "model", whole.params, whole.config, whole.tokenizer, {"stage": "finetune"})
    mesh = parallel.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spread = load(str(tmp_path / "model"), mesh=mesh)
    kernel = spread.params["layers"]["mlp"]["up_proj"]["kernel"]
    assert len(kernel.sharding.device_set) == 8 and kernel.addressable_shards[0].data.size == kernel.size // 4
    args = (QUESTIONS, images_for(pictures), 6)
    assert spread.generate(*args) == whole.generate(*args)
    half = load(str(tmp_path / "model"), dtype="bfloat16")
    assert half.model_config.dtype == "bfloat16" and "in bfloat16, computed in bfloat16)" in repr(half)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(half.params)} == {1}


def test_few_programs_are_compiled(tiny_model, pictures):
    """Each takes seconds on a slow machine: what is done eagerly, before or after a program, is one more."""
    shared = tiny_model("saisa")
    model = VisionLanguageModel(shared.params, shared.config, shared.tokenizer, "finetune", shared.metadata)
    jax.clear_caches()  # of other tests in this process
    with compilations() as first:
        model.generate("what color is the shape?", pictures[0], max_new_tokens=4)
    assert first == ["jit(_run_encode)", "jit(_run_answer)"]
    with compilations() as like_it:
        model.generate("what is it?", pictures[1], max_new_tokens=8, temperature=1, top_p=0.5, seed=7)
    assert like_it == []
    with compilations() as longer:
        model.generate("what is it? " * 8, pictures[1], max_new_tokens=4)
    assert longer == ["jit(_run_answer)"]
    chat = model.chat()
    chat.add_image(pictures[1])
    with compilations() as talk:
        list(chat.ask("what color is the shape?", 4))
    assert talk == ["jit(_run_start)", "jit(_run_step)"]
    with compilations() as turn:
        list(chat.ask("what is it?", 4))
    assert set(turn) <= {"jit(_run_extend)", "jit(_run_step)"} and len(turn) <= 2
