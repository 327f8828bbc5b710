"""Images that were encoded once: their keys and values for all layers, found again by content.

Under all alignments but LLaVA an image's keys and values depend on the image alone, so every further question and turn
about it reuses them. Under LLaVA this is impossible across different prefixes: an image's keys in layer l depend on
what its tokens attended to in the layers below, which is everything before it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from saisa_jax.models.kv_cache import ImageKV

DEFAULT_BYTES = 2**30


@dataclass(frozen=True, eq=False, repr=False)
class EncodedImage:
    """An encoded image: give it to `generate` in place of the image.

    Attributes:
      key: a hash of its pixels.
      pixels: as prepared for the vision encoder; of an image of several views (`data/views.py`), of the first.
      kv: keys, not rotated, and values [Lv, 1, K, P, H]; None where they depend on the prompt (LLaVA).
      model: the parameters that made `kv`; another model encodes the pixels again.
      tiles: the other views of the image, each of which takes a slot and an entry of the cache by itself.
    """

    key: str
    pixels: UInt8[np.ndarray, "size size 3"]
    kv: ImageKV | None
    model: Any = None
    tiles: tuple[EncodedImage, ...] = ()

    @classmethod
    def of(cls, pixels: np.ndarray) -> EncodedImage:
        """Prepared pixels of one view that are not encoded yet."""
        return cls(content_key(pixels), pixels, None)

    @classmethod
    def of_views(cls, views: Sequence[np.ndarray | EncodedImage]) -> EncodedImage:
        """The image of these views."""
        first, *tiles = (view if isinstance(view, EncodedImage) else cls.of(view) for view in views)
        return dataclasses.replace(first, tiles=tuple(tiles)) if tiles else first

    @property
    def views(self) -> tuple[EncodedImage, ...]:
        """What takes the image's slots, one after the other."""
        return (dataclasses.replace(self, tiles=()), *self.tiles) if self.tiles else (self,)

    def __repr__(self) -> str:
        tiles = f" and {len(self.tiles)} tiles" if self.tiles else ""
        return f"EncodedImage({self.key}, {self.pixels.shape[0]} pixels{tiles}, {self.nbytes} bytes of keys and values)"

    @property
    def nbytes(self) -> int:
        """Bytes of its keys and values, without those of its tiles."""
        return 0 if self.kv is None else self.kv.k.nbytes + self.kv.v.nbytes


def content_key(pixels: UInt8[np.ndarray, "size size 3"]) -> str:
    """A hash of the pixels: the same whichever file they came from."""
    return hashlib.blake2b(np.ascontiguousarray(pixels).tobytes(), digest_size=16).hexdigest()


class ImageCache:
    """The images used last, as many as fit into `max_bytes` of keys and values. Threads may share it."""

    def __init__(self, max_bytes: int = DEFAULT_BYTES):
        self.max_bytes = max_bytes
        self.nbytes = self.hits = self.misses = 0
        self._images: OrderedDict[str, EncodedImage] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._images)

    def get(self, key: str) -> EncodedImage | None:
        """The image of that key, marked as the one used last."""
        with self._lock:
            image = self._images.get(key)
            if image is None:
                self.misses += 1
                return None
            self.hits += 1
            self._images.move_to_end(key)
            return image

    def put(self, image: EncodedImage) -> None:
        """Keeps an image, and evicts the least recently used ones until all fit."""
        with self._lock:
            if image.key in self._images:
                self.nbytes -= self._images.pop(image.key).nbytes
            if image.nbytes > self.max_bytes:
                return
            self._images[image.key] = image
            self.nbytes += image.nbytes
            while self.nbytes > self.max_bytes:
                self.nbytes -= self._images.popitem(last=False)[1].nbytes
