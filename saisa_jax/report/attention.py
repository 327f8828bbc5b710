"""Attention of the answer's first token to the image's patches, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from saisa_jax.config import VisionConfig
from saisa_jax.data.images import load_image
from saisa_jax.data.views import prepare_views
from saisa_jax.report import pictures

MAX_LAYERS = 8  # shown; of deeper models they are spread evenly, the first and the last among them


@dataclass(frozen=True)
class Picture:
    """One image of the row that shows a question's attention."""

    caption: str
    pixels: np.ndarray  # [h, h, 3] uint8


@dataclass(frozen=True)
class Looked:
    """A prediction, its image, and its attention by layer."""

    prediction: dict[str, Any]
    pictures: tuple[Picture, ...]

    @property
    def strip(self) -> bytes:
        """All images side by side, as a PNG file."""
        return pictures.png(pictures.strip([picture.pixels for picture in self.pictures]))


def look(model: Any, predictions: Sequence[dict[str, Any]], size: int = pictures.TILE) -> list[Looked]:
    """Draws the attention of each prediction's answer.

    Args:
      model: the model; its `attention(question, images)` gives [L, P].
      predictions: of the model, each with an image.
      size: pixels of a side of each picture.
    """
    return [_look(model, row, size) for row in predictions]


def _look(model: Any, row: dict[str, Any], size: int) -> Looked:
    vision: VisionConfig = model.config.model.vision
    image = load_image(row["image"], row["id"])
    pixels = prepare_views(image, vision, row["id"])[0]  # the whole; tiles come behind it
    seen = vision.patches_per_side * vision.patch_size  # so that the patches fit the image
    pixels = pixels[:seen, :seen]
    weights = np.asarray(model.attention(row["question"], [row["image"]]), np.float32)
    shown = [Picture("the image", pictures.tile(pixels, size))]
    for layer in layers_to_show(len(weights)):
        share = float(weights[layer].sum())
        caption = f"layer {layer + 1}: {share:.0%} on the image" if share > 0 else f"layer {layer + 1} does not see it"
        shown.append(Picture(caption, pictures.attention_tile(pixels, weights[layer, : vision.num_patches], size)))
    return Looked(row, tuple(shown))


def layers_to_show(count: int) -> list[int]:
    """All layers, or MAX_LAYERS of them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, MAX_LAYERS)).tolist()})
