"""Flamingo's cross layers: the start, the windows of local text, and where the cache keeps what."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saisa_jax.config import TRAIN_PROJECTOR, FlamingoConfig
from saisa_jax.models.mask import PackedPositions, make_mask
from saisa_jax.models.saisa import Saisa, init_params
from saisa_jax.models.streams import windows
from saisa_jax.testing.batches import IMAGE, make_batch
from saisa_jax.testing.configs import tiny_config
from saisa_jax.training.memory import kept_bytes

LAYOUTS = [[5, 6, IMAGE, 7, 8], [3, 4, 9]]


@pytest.mark.parametrize("name", ["flamingo", "casa"])
def test_with_gates_at_0_it_is_the_text_decoder_to_the_bit(name: str) -> None:
    """Text in the places that it has beside the image; the decoder's own program has no image and no cross layers."""
    config = tiny_config(name).model
    params = init_params(config, jax.random.key(0))
    batch = make_batch(config, LAYOUTS, text_length=6, max_images=1)
    crossed = jax.jit(lambda p, b: Saisa(config).apply({"params": p}, b)[0])(params, batch)
    text = make_batch(config, LAYOUTS, text_length=6, max_images=1)
    text.update({key: text[key][:, :0] for key in ("images", "image_positions", "image_segment_ids")})
    other = dataclasses.replace(config, alignment="naavit", flamingo=FlamingoConfig())
    own = {key: value for key, value in params.items() if key != "cross_layers"}
    alone = jax.jit(lambda p, b: Saisa(other).apply({"params": p}, b)[0])(own, text)
    np.testing.assert_array_equal(crossed, alone)


def test_windows_of_local_text() -> None:
    """Two samples of a row: "a <i><i> b <i> c" with images of two tokens, and "d <i> e"; a slot is empty."""
    images = PackedPositions(
        jnp.array([[1, 2, 3, 4, 6, 7, 1, 2, 0, 0]]), jnp.array([[1, 1, 1, 1, 1, 1, 2, 2, 0, 0]])
    )  # fmt: skip
    text = PackedPositions(jnp.array([[0, 5, 8, 0, 3, 0]]), jnp.array([[1, 1, 1, 2, 2, 0]]))
    at, seen = windows(text, images, 2), windows(images, images, 2)
    of_images = np.asarray(make_mask(at, seen).allowed)[0].astype(int).tolist()
    assert of_images == [
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # a
        [1, 1, 1, 1, 0, 0, 0, 0, 0, 0],  # b: both images, which stand together
        [0, 0, 0, 0, 1, 1, 0, 0, 0, 0],  # c: the last one alone
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # padding
    ]
    among = np.asarray(make_mask(at, at).allowed)[0].astype(int)
    assert among.tolist() == np.diag([1, 1, 1, 1, 1, 0]).tolist()  # every token is alone in its window
    longer = PackedPositions(jnp.array([[0, 5, 6]]), jnp.ones((1, 3), int))
    near = windows(longer, PackedPositions(images.positions[:, :2], images.segment_ids[:, :2]), 2)
    assert np.asarray(make_mask(near, near).allowed)[0].astype(int).tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]


def test_the_cache_holds_an_images_keys_as_they_are_and_the_text_that_cross_layers_read() -> None:
    for name, layers in (("flamingo", 2), ("casa", 2 + 2)):
        config = tiny_config(name).model
        batch = make_batch(config, LAYOUTS, text_length=6, max_images=1)
        shapes = jax.eval_shape(lambda c=config: init_params(c, jax.random.key(0)))
        model = Saisa(config)
        prefill = lambda p, b, m=model: m.apply({"params": p}, b, 3, method="prefill")[1]  # noqa: E731
        cache = jax.eval_shape(prefill, shapes, batch)
        assert cache.k.shape[0] == config.num_cached_layers == layers
        assert cache.visual.k.shape == (len(config.cross_layers), 2, config.num_kv_heads, 16, config.head_dim)


def test_under_remat_the_backward_pass_keeps_the_inputs_of_layers_and_of_cross_layers_alone() -> None:
    config = dataclasses.replace(
        tiny_config("flamingo").model, num_layers=8, attention_impl="xla", remat_policy="full"
    )  # four cross layers
    rows, text = 3, 40
    kept = kept_bytes(config, TRAIN_PROJECTOR, rows, text, images=2)
    assert kept == (8 + 4) * rows * text * config.embed_dim * 4
