"""The views of an image, each of which takes an image slot: one square; under `anyres` the whole, and its tiles.

`model.vision.image_mode=anyres` is LLaVA-NeXT's "any resolution": of the grids that are known, the image is laid on the
one which keeps most of its pixels, its aspect kept, black around it; the grid is cut into tiles of the encoder's size,
row by row. Before them stands a view of the whole image, resized whatever its aspect:

    640 x 480 on a grid of 672 x 672      whole | top left, top right, bottom left, bottom right      5 views

How many views an image has follows from its size alone, which its file's first bytes tell.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from saisa_jax.config import VisionConfig
from saisa_jax.data.images import image_size, load_image, prepare_image, resized
from saisa_jax.data.sample import ImageSource, StoredImage


def best_grid(size: tuple[int, int], vision: VisionConfig) -> tuple[int, int]:
    """The grid (height, width) in pixels that an image is laid on: it keeps most pixels, and has least around them.

    Args:
      size: (width, height) of the image.
      vision: of image mode anyres.
    """
    width, height = size

    def kept_and_around(grid: tuple[int, int]) -> tuple[int, int]:
        scale = min(grid[1] / width, grid[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - grid[0] * grid[1]

    return max(vision.grids, key=kept_and_around)  # the first of equals


def num_views(size: tuple[int, int], vision: VisionConfig) -> int:
    """How many image slots an image of a size (width, height) takes."""
    if not vision.grids:
        return 1
    height, width = best_grid(size, vision)
    return 1 + height * width // vision.image_size**2


def count_views(source: ImageSource | Image.Image, vision: VisionConfig, sample_id: str = "") -> int:
    """How many image slots an image takes; where it is one square, nothing of it is read.

    Args:
      source: an image, as `load_image` reads it, or its features.
      vision: how it is prepared.
      sample_id: for errors.

    Raises:
      DataError: its size cannot be read.
    """
    if not vision.grids:
        return 1
    if isinstance(source, np.ndarray):
        return len(source)
    return num_views(image_size(source, sample_id), vision)


def prepare_views(
    image: Image.Image, vision: VisionConfig, sample_id: str = ""
) -> UInt8[np.ndarray, "views size size 3"]:
    """All views of an RGB image.

    Raises:
      DataError: as `prepare_image`.
    """
    size = vision.image_size
    if not vision.grids:
        return prepare_image(image, size, vision.image_mode, vision.image_mean, sample_id)[None]
    whole = prepare_image(image, size, "resize", vision.image_mean, sample_id)
    height, width = best_grid(image.size, vision)
    laid = np.asarray(_laid_on(image, (height, width)), np.uint8)
    tiles = laid.reshape(height // size, size, width // size, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    return np.concatenate([whole[None], tiles])


def _laid_on(image: Image.Image, grid: tuple[int, int]) -> Image.Image:
    """The image as large as fits, in the middle of black; a side that is not whole is rounded up."""
    (width, height), (grid_height, grid_width) = image.size, grid
    if grid_width / width < grid_height / height:
        inner = grid_width, min(math.ceil(height * (grid_width / width)), grid_height)
    else:
        inner = min(math.ceil(width * (grid_height / height)), grid_width), grid_height
    laid = Image.new("RGB", (grid_width, grid_height))
    laid.paste(resized(image, inner), ((grid_width - inner[0]) // 2, (grid_height - inner[1]) // 2))
    return laid


class ImageLoader:
    """Reads and prepares images, and keeps the last ones in memory; safe to share among threads.

    Small sets of images are decoded once; of large ones as many are kept as fit.
    """

    def __init__(self, vision: VisionConfig, cache_bytes: int = 256 * 2**20) -> None:
        """`vision` says how images are prepared; `cache_bytes` bounds the arrays that are kept."""
        self.vision, self.cache_bytes = vision, cache_bytes
        self._cache: OrderedDict[str, UInt8[np.ndarray, "views size size 3"]] = OrderedDict()
        self._kept = 0  # bytes
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": OrderedDict(), "_kept": 0, "_lock": None}  # another process has its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __call__(
        self, source: ImageSource | Image.Image, sample_id: str = ""
    ) -> UInt8[np.ndarray, "views size size 3"]:
        """The image's views, read-only. Only images with a path are kept. Errors as `load_image`."""
        key = _key(source)
        if key is not None:
            with self._lock:
                if key in self._cache:
                    self._cache.move_to_end(key)
                    return self._cache[key]
        views = prepare_views(load_image(source, sample_id), self.vision, sample_id)
        views.flags.writeable = False
        if key is not None and views.nbytes <= self.cache_bytes:
            with self._lock:
                if key not in self._cache:  # two threads may have read it
                    self._cache[key] = views
                    self._kept += views.nbytes
                while self._kept > self.cache_bytes:
                    self._kept -= self._cache.popitem(last=False)[1].nbytes
        return views


def _key(source: ImageSource | Image.Image) -> str | None:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return source.name if isinstance(source, StoredImage) else None
