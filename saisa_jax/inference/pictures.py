"""A picture in whatever form a user has it -> a form that `ImageLoader` reads."""

from __future__ import annotations

import base64
import os
import time
import urllib.error
import urllib.request
from typing import Any

import numpy as np
from PIL import Image

from saisa_jax.data.sample import DataError, ImageSource, StoredImage

URL_SECONDS = 20.0  # for a whole picture
URL_BYTES = 2**25
FORMS = (
    "a path, a PIL image, an array or tensor [height, width, 3] or [3, height, width] of uint8 or of floats in 0..1, "
    "bytes, a data URL or an open file"
)


def picture(given: Any, name: str = "", allow_urls: bool = False) -> ImageSource | Image.Image:
    """A picture for `ImageLoader`.

    Args:
      given: one of `FORMS`; with `allow_urls` an http or https URL, which is fetched within `URL_SECONDS` and
        `URL_BYTES`.
      name: for errors.
      allow_urls: fetch.

    Raises:
      DataError: something else, an array that may be read in two ways, or a URL that may not or cannot be fetched.
    """
    if isinstance(given, str):
        if given.startswith("data:"):
            return _data_url(given, name)
        if given.lower().startswith(("http://", "https://")):
            if not allow_urls:
                raise DataError(
                    f"{given[:200]} is a URL, and nothing is fetched: give its bytes, a file, or load the model with "
                    "allow_urls=True (chat: --allow_urls)",
                    name,
                )
            return _fetch(given, name)
        return os.path.expanduser(given)
    if isinstance(given, bytes | Image.Image | os.PathLike):
        return given
    if isinstance(given, bytearray | memoryview):
        return bytes(given)
    if hasattr(given, "shape") and hasattr(given, "dtype"):
        return _from_array(given, name)
    if hasattr(given, "read") and hasattr(given, "seekable"):
        if given.seekable():
            given.seek(0)
        content = given.read()
        if isinstance(content, bytes):
            return content
        raise DataError("a file of an image is opened for bytes: open(name, 'rb')", name)
    if isinstance(given, StoredImage):
        return given
    raise DataError(f"an image is {FORMS}; this is a {type(given).__name__}", name)


def _data_url(given: str, name: str) -> bytes:
    head, _, content = given.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("it is not in base64")
        return base64.b64decode("".join(content.split()), validate=True)
    except ValueError as error:
        raise DataError(f"a data URL that cannot be read ({error}): {given[:40]!r}", name) from error


def _from_array(given: Any, name: str) -> Image.Image:
    """Of numpy, JAX or torch. What could be read in two ways is refused: no picture is guessed."""
    seen = f"{str(given.dtype).removeprefix('torch.')} {list(given.shape)}"
    if hasattr(given, "detach"):  # torch, which is not imported for it; numpy has no bfloat16 of torch's
        given = given.detach().cpu()
        given = given.float() if given.is_floating_point() else given
    array = np.asarray(given)
    if array.ndim != 3 or 3 not in (array.shape[0], array.shape[2]):
        one = "; it is several pictures: give them one by one" if array.ndim == 4 else ""
        raise DataError(
            f"an array of an image is [height, width, 3] or [3, height, width] in RGB, not {seen}{one}", name
        )
    if array.shape[0] == array.shape[2]:
        raise DataError(
            f"an array of an image that is {seen} may have its colours first or last: give a PIL image", name
        )
    if array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.dtype != np.uint8:
        array = _to_bytes(array, seen, name)
    return Image.fromarray(np.ascontiguousarray(array))


def _to_bytes(array: np.ndarray, seen: str, name: str) -> np.ndarray:
    if array.dtype.kind not in "fV":  # V: ml_dtypes' bfloat16
        raise DataError(
            f"an array of an image is uint8, or floats in 0..1, not {seen}: .astype('uint8') if in 0..255", name
        )
    array = array.astype(np.float32)
    low, high = (float(array.min()), float(array.max())) if array.size else (np.nan, np.nan)
    if not (low >= 0 and high <= 1):  # NaN as well
        raise DataError(
            f"an array of an image in floats is in 0..1, and this one ({seen}) in {low:g}..{high:g}: give uint8 where "
            "it is in 0..255, and the picture itself where it was normalised for another model",
            name,
        )
    return np.rint(array * 255).astype(np.uint8)


def _fetch(url: str, name: str) -> bytes:
    """What stands at an http or https URL, in a bounded time and size; redirects stay with these schemes."""
    end, content = time.monotonic() + URL_SECONDS, bytearray()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "saisa_jax"})
        with _opener().open(request, timeout=URL_SECONDS) as answer:
            while chunk := answer.read1(2**16):
                content += chunk
                if len(content) > URL_BYTES:
                    raise ValueError(f"it is larger than {URL_BYTES / 1e6:.0f} MB")
                if time.monotonic() > end:
                    raise ValueError(f"it takes longer than {URL_SECONDS:g} s")
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise DataError(f"{url[:200]} cannot be fetched: {error or type(error).__name__}", name) from error
    return bytes(content)


def _opener() -> urllib.request.OpenerDirector:
    """Of http and https alone: urllib's own would follow a redirect to ftp, and reads files."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler, urllib.request.HTTPErrorProcessor, urllib.request.HTTPDefaultErrorHandler,
        urllib.request.UnknownHandler,
    ):  # fmt: skip
        opener.add_handler(handler())
    return opener
