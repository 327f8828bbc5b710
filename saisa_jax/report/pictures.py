"""Images for the page, and attention drawn over them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

TILE = 256  # pixels of a side
GRID = 0.16  # how much of the lines between patches is white
COLORMAP = "inferno"  # ordered by lightness, so that it reads without colour


def png(pixels: UInt8[np.ndarray, "h w 3"] | Image.Image) -> bytes:
    """An RGB image as the bytes of a PNG file."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def jpeg(pixels: UInt8[np.ndarray, "h w 3"] | Image.Image) -> bytes:
    """An RGB image as the bytes of a JPEG file, a fifth of a photo's PNG."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80, optimize=True)
    return out.getvalue()


def thumbnail(image: Image.Image, longest: int) -> Image.Image:
    """A copy whose longer side has at most so many pixels."""
    small = image.copy()
    small.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return small


def tile(pixels: UInt8[np.ndarray, "h h 3"], size: int = TILE) -> UInt8[np.ndarray, "size size 3"]:
    """A square image, resized smoothly."""
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS))


def attention_tile(
    pixels: UInt8[np.ndarray, "h h 3"],
    weights: Float[np.ndarray, "P"],  # noqa: UP037
    size: int = TILE,
) -> UInt8[np.ndarray, "size size 3"]:
    """Attention over the patches of an image as heat, bright where it is strongest, with the image as its shading.

    Args:
      pixels: the image as the encoder got it, so that the patches fit.
      weights: attention to each patch, row by row; only their proportions matter.
      size: pixels of a side of the result.

    Raises:
      ValueError: the patches do not make a square.
    """
    side = math.isqrt(weights.size)
    if side * side != weights.size:
        raise ValueError(f"{weights.size} patches are not a square grid")
    heat = weights.reshape(side, side) / max(float(weights.max()), 1e-12)
    heat = np.asarray(Image.fromarray(heat.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC))
    colors = matplotlib.colormaps[COLORMAP](heat.clip(0, 1))[..., :3]
    grey = tile(pixels, size).mean(axis=-1, keepdims=True) / 255
    drawn = colors * (0.4 + 0.6 * grey) + 0.2 * grey * (1 - colors)
    for line in np.arange(1, side) * size // side:
        drawn[line] += GRID * (1 - drawn[line])
        drawn[:, line] += GRID * (1 - drawn[:, line])
    return (drawn.clip(0, 1) * 255).astype(np.uint8)


def strip(tiles: Sequence[UInt8[np.ndarray, "h w 3"]], gap: int = 8) -> UInt8[np.ndarray, "h W 3"]:
    """Tiles of one height side by side, with white between them."""
    white = np.full((tiles[0].shape[0], gap, 3), 255, np.uint8)
    parts = [part for one in tiles for part in (white, one)][1:]
    return np.concatenate(parts, axis=1)
