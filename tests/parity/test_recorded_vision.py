"""The vision side against the recorded fixtures: pixels, the tower's residual stream, and the way from a picture to
logits and generated tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from saisa_jax.batch import Batch
from saisa_jax.data.images import prepare_image
from saisa_jax.inference.generate import Generator
from saisa_jax.models.encoders.vit import VisionEncoder

if TYPE_CHECKING:
    from tests.parity.conftest import Fixture

pytestmark = pytest.mark.parity


def close(seen: Any, expected: np.ndarray, tolerance: float) -> None:
    assert seen.shape == expected.shape
    np.testing.assert_allclose(np.asarray(seen), expected, rtol=0, atol=tolerance)


def prepared(saisa_tiny: Fixture, picture: str) -> np.ndarray:
    """The raw recorded picture as our data pipeline hands it to the model."""
    vision = saisa_tiny.config.vision
    raw = Image.fromarray(saisa_tiny.expected[f"image_{picture}.rgb_uint8"])
    return prepare_image(raw, vision.image_size, vision.image_mode, vision.image_mean)


@pytest.mark.parametrize("picture", ["a", "b"])
def test_pixels(recorded: Fixture, saisa_tiny: Fixture, picture: str) -> None:
    vision = recorded.config.vision
    pixels = prepared(saisa_tiny, picture).astype(np.float32) / 255.0
    pixels = (pixels - np.float32(vision.image_mean)) / np.float32(vision.image_std)
    close(pixels.transpose(2, 0, 1), recorded.expected[f"image_{picture}.pixel_values"], 2e-6)


def test_features_and_hidden_states(
    recorded: Fixture, tower: dict[str, Any], saisa_tiny: Fixture, fixtures_dir: Path
) -> None:
    full = load_file(fixtures_dir / "saisa_tiny" / "expected.safetensors")  # llava_tiny's tower is the same
    images = np.stack([prepared(saisa_tiny, picture) for picture in "ab"])
    encoder = VisionEncoder(recorded.config.vision)
    features, hidden = jax.jit(lambda p, x: encoder.apply({"params": p}, x, capture=True))(tower["vision"], images)
    for row, picture in enumerate("ab"):
        states = full[f"image_{picture}.vision_hidden_states"]
        # The last of the recorded states belongs to a layer after the selected one, which does not exist here.
        close(hidden[:, row], states[: recorded.config.vision.num_used_layers + 1], 1e-4)
        close(features[row], recorded.expected[f"image_{picture}.vision_features"], 1e-4)


def with_pictures(recorded: Fixture, saisa_tiny: Fixture) -> Batch:
    batch = recorded.batch()
    for row, name in enumerate(recorded.prompts):
        batch["images"][row, 0] = prepared(saisa_tiny, recorded.numbers["prompts"][name]["image"])
    return batch


def test_from_picture_to_logits(recorded: Fixture, tower: dict[str, Any], saisa_tiny: Fixture) -> None:
    params, batch = {**recorded.params, **tower}, with_pictures(recorded, saisa_tiny)
    logits = np.asarray(jax.jit(lambda p, b: recorded.model.apply({"params": p}, b)[0])(params, batch))
    for row, name in enumerate(recorded.prompts):
        places = recorded.text_positions(name)
        expected = (
            recorded.expected[f"{name}.logits_text"]
            if recorded.name == "saisa_tiny"
            else recorded.expected[f"{name}.logits"][places]
        )
        close(logits[row, : len(places)], expected, 1e-4)


def test_generated_tokens(recorded: Fixture, tower: dict[str, Any], saisa_tiny: Fixture) -> None:
    generate = Generator(recorded.config, eos_ids=())  # the recorded run does not end either
    params = {**recorded.params, **tower}
    seen = generate(params, with_pictures(recorded, saisa_tiny), recorded.new_tokens)
    for row, name in enumerate(recorded.prompts):
        # With the image first the official code's cached decoding is at fault; its repeated prefill is not.
        kind = "gen_recomputed_tokens" if recorded.name == "saisa_tiny" else "gen_tokens"
        assert seen[row] == recorded.expected[f"{name}.{kind}"].tolist(), name
