"""Samples that share a row learn what they would learn each in a row of its own."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from saisa_jax.data.rows.collate import Example, pack_rows
from saisa_jax.data.sample import Turn
from saisa_jax.data.text.conversation import encode
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.models.saisa import Saisa, init_params
from saisa_jax.testing.configs import PROJECTORS, tiny_config
from saisa_jax.training.loss import cross_entropy

SAMPLES = (  # images, question, answer
    (1, "<image> what is it?", "a red circle"),
    (0, "is it red?", "no, it is blue"),
    (2, "<image> or <image> what is the color?", "teal"),
    (1, "is <image> a circle?", "yes"),
    (0, "what is the shape?", "a triangle"),
)


@pytest.mark.parametrize(
    "alignment", ["saisa", "naavit", "llava", pytest.param("casa", marks=pytest.mark.slow), *PROJECTORS]
)
def test_packed_loss_and_gradients_are_those_of_single_rows(alignment: str) -> None:
    config = tiny_config(alignment).model
    tokenizer, rng, size = load_tokenizer("easy_vqa"), np.random.default_rng(0), config.vision.image_size
    examples = [
        Example(
            encode((Turn("user", ask), Turn("assistant", answer)), "vicuna_v1", tokenizer, config.vision.num_patches,
                   system_prompt="", sample_id=str(i)),
            [rng.integers(0, 256, (size, size, 3), np.uint8) for _ in range(images)],
        )
        for i, (images, ask, answer) in enumerate(SAMPLES)
    ]  # fmt: skip
    dropped = [examples[0], None, examples[2]]
    packed = pack_rows([examples[:3], examples[3:], dropped], 48, 4, size, count=7)  # one shape, one compilation
    single = pack_rows([[example] for example in [*examples, examples[0], examples[2]]], 48, 4, size)
    params = init_params(config, jax.random.key(0))

    def loss(params, batch):
        logits, _ = Saisa(config).apply({"params": params}, batch)
        total, weight = cross_entropy(logits, batch["targets"], batch["loss_weights"])
        return total / weight

    step = jax.jit(jax.value_and_grad(loss))
    ours, of_rows = step(params, packed), step(params, single)
    np.testing.assert_allclose(ours[0], of_rows[0], rtol=1e-5)
    for (path, one), two in zip(jax.tree_util.tree_leaves_with_path(ours[1]), jax.tree.leaves(of_rows[1]), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5 * max(1.0, float(abs(two).max())), err_msg=str(path))
