"""Images on the host: read, made RGB, made square. They stay uint8 until they are on the device."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from absl import logging
from jaxtyping import UInt8
from PIL import Image, ImageOps

from saisa_jax.config import SQUARE_MODES
from saisa_jax.data.sample import DataError, ImageSource, StoredImage

T = TypeVar("T")

# Beyond these an image is refused before it is decoded. The pixels are those at which PIL begins to warn, 268 MB as
# RGB; as 16 bits without compression they are the bytes.
MAX_PIXELS = 89_478_485
MAX_BYTES = 2**29
MAX_WARNINGS = 20  # of images that become one colour
_warnings = itertools.count()  # absl's own `log_first_n` was seen to count all its callers together
ORIENTATION = 0x0112  # of EXIF: how the image is to be turned
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def image_size(source: ImageSource | Image.Image, sample_id: str = "") -> tuple[int, int]:
    """(width, height) of the image that `load_image` would give; no pixel is decoded (but of a
    PNG that says nothing of EXIF before its pixels). Args and errors as there."""
    return _reading(source, sample_id, lambda image, name: _upright_size(image))


def load_image(source: ImageSource | Image.Image, sample_id: str = "") -> Image.Image:
    """An image as RGB, turned upright by its EXIF orientation.

    It becomes RGB as PIL's `convert("RGB")` makes it, and so as LLaVA reads it: an alpha channel is dropped, not
    blended; grey of 16 and 32 bits is clipped at 255; of an animation the first frame is kept. A picture that becomes
    one colour by it, or nearly, is told of in the log.

    Args:
      source: a path, the bytes of a file, a place in an archive, or a PIL image.
      sample_id: for errors.

    Raises:
      DataError: missing, unreadable, truncated, of an unknown format, or of more than `MAX_PIXELS` or
        `MAX_BYTES`.
    """
    return _reading(source, sample_id, _decoded)


def _reading(source: ImageSource | Image.Image, sample_id: str, read: Callable[[Image.Image, str], T]) -> T:
    """What `read` makes of an image that is open, and of its name; errors as of `load_image`."""
    name = _name(source)
    try:
        _check_bytes(source, name, sample_id)
        image = source if isinstance(source, Image.Image) else _open(source, sample_id)
        _check_pixels(image.width * image.height, f"{name} has {image.width} x {image.height} pixels", sample_id)
        return read(image, name)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise missing_image(name, sample_id) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name} is too large to decode: {error}", sample_id) from error
    except Exception as error:  # PIL's readers raise almost anything on broken files
        raise DataError(f"cannot read {name}: {error or type(error).__name__}", sample_id) from error


def _decoded(image: Image.Image, name: str) -> Image.Image:
    deep = any("16" in str(tile[-1]) for tile in getattr(image, "tile", ()))  # bits a colour, of which PIL keeps 8
    image.load()
    return _rgb(_upright(image), name, deep)


def read_image(source: ImageSource, sample_id: str = "") -> bytes:
    """The encoded file of an image, as it is on the disk.

    Raises:
      DataError: there is none, or it cannot be read.
    """
    if isinstance(source, bytes):
        return source
    if isinstance(source, np.ndarray):
        raise _no_file(source, sample_id)
    try:
        return source.read() if isinstance(source, StoredImage) else Path(source).read_bytes()
    except FileNotFoundError as error:
        raise missing_image(_name(source), sample_id) from error
    except (DataError, OSError, ValueError) as error:
        raise DataError(f"cannot read {_name(source)}: {error}", sample_id) from error


def prepare_image(
    image: Image.Image, size: int, mode: str, mean: Sequence[float], sample_id: str = ""
) -> UInt8[np.ndarray, "size size 3"]:
    """An RGB image as a square array.

    Args:
      image: RGB.
      size: pixels of a side.
      mode: `pad` puts the image in the middle of a square of the mean color and resizes that; `square` resizes the
        shorter side and cuts out the centre; `resize` changes the aspect. All resize bicubically.
      mean: the vision encoder's mean, of R, G and B in 0..1; int(255 * mean) is the color of the padding.
      sample_id: for errors.

    Raises:
      DataError: the image is so long that its padded square, or its resized form, exceeds `MAX_PIXELS`.
    """
    width, height = image.size
    if mode == "pad":
        image = _padded(image, mean, sample_id)
    elif mode == "square":
        short, long = min(width, height), max(width, height)
        longer = int(size * long / short)
        _check_pixels(size * longer, f"{width} x {height} pixels become {size} x {longer} when resized", sample_id)
        image = resized(image, (size, longer) if width < height else (longer, size))
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    elif mode != "resize":
        raise DataError(f"model.vision.image_mode={mode!r} is not one of {', '.join(SQUARE_MODES)}", sample_id)
    return np.array(resized(image, (size, size)), np.uint8)


def augment(image: UInt8[np.ndarray, "size size 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "size size 3"]:
    """The image, perhaps mirrored left to right, and moved by up to 1/16 of its size.

    The uncovered border takes the background's color, the median of the border.
    """
    mirror = bool(rng.integers(2))
    reach = image.shape[0] // 16
    down, right = (int(step) for step in rng.integers(-reach, reach + 1, size=2))
    image = image[:, ::-1] if mirror else image
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    size = image.shape[0]
    moved = np.empty_like(image)
    moved[:] = np.sort(border, axis=0)[len(border) // 2]
    to_row, to_column = max(down, 0), max(right, 0)
    row, column = max(-down, 0), max(-right, 0)
    rows, columns = size - abs(down), size - abs(right)
    moved[to_row : to_row + rows, to_column : to_column + columns] = image[row : row + rows, column : column + columns]
    return moved


def _open(source: ImageSource, sample_id: str) -> Image.Image:
    """Reads the header; pixels are decoded later."""
    if isinstance(source, StoredImage):
        source = read_image(source, sample_id)
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source), formats=FORMATS)
    if isinstance(source, np.ndarray):
        raise _no_file(source, sample_id)
    return Image.open(Path(source), formats=FORMATS)


def _name(source: ImageSource | Image.Image) -> str:
    if isinstance(source, bytes):
        return f"image of {len(source)} bytes"
    if isinstance(source, np.ndarray):
        return f"array of {source.shape} {source.dtype}"
    if isinstance(source, Image.Image):
        return f"{source.mode} image"
    if isinstance(source, StoredImage):
        return source.name
    return os.fspath(source)


def _no_file(source: np.ndarray, sample_id: str) -> DataError:
    return DataError(f"the features of an image are here ({_name(source)}), and the image is wanted", sample_id)


def _check_bytes(source: ImageSource | Image.Image, name: str, sample_id: str) -> None:
    size = os.path.getsize(source) if isinstance(source, str | os.PathLike) else 0
    size = len(source) if isinstance(source, bytes) else size
    if size > MAX_BYTES:
        raise DataError(f"{name} is a file of {size:,} bytes; at most {MAX_BYTES:,} are read", sample_id)


def _check_pixels(pixels: int, seen: str, sample_id: str) -> None:
    if pixels > MAX_PIXELS:
        raise DataError(f"{seen}; at most {MAX_PIXELS:,} are decoded: make it smaller", sample_id)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """As of what `_upright` gives."""
    try:
        turned = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)  # by a quarter
    except Exception:  # as in `_upright`
        turned = False
    return (image.height, image.width) if turned else image.size


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the image itself is good; only its EXIF data cannot be read
        return image


def _rgb(image: Image.Image, name: str, deep: bool) -> Image.Image:
    if image.mode in ("RGB", "L"):
        converted = image.convert("RGB")
        if deep and max(high for _, high in _extremes(converted)) < 16 and next(_warnings) < MAX_WARNINGS:
            logging.warning(
                "%s becomes black, or nearly: of its colours of 16 bits the upper 8 are read, as in LLaVA, and it "
                "holds values of 8 or 12 bits; save it as 8-bit RGB",
                name,
            )
        return converted
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    converted = image.convert("RGB")
    clipped = image.mode.startswith("I") and np.median(np.asarray(image)) > 255
    if (clipped or _one_value(converted)) and not _one_value(image) and next(_warnings) < MAX_WARNINGS:
        logging.warning(
            "%s becomes one colour, or nearly, when it is read as RGB, though it holds several values (mode %s): "
            "transparency is dropped, and grey above 255 is clipped, as in LLaVA; save it as 8-bit RGB",
            name,
            image.mode,
        )
    return converted


def _one_value(image: Image.Image) -> bool:
    """Whether each channel holds one value."""
    return all(low == high for low, high in _extremes(image))


def _extremes(image: Image.Image) -> Any:
    """(least, largest) of each channel."""
    extremes: Any = image.getextrema()
    return extremes if isinstance(extremes[0], tuple) else (extremes,)


def image_name(image: ImageSource) -> str:
    """Where an image lies: unique to it; of one that is given as bytes, or as its features, a name by content."""
    if isinstance(image, bytes | np.ndarray):
        content = image if isinstance(image, bytes) else image.tobytes()
        return f"bytes:{hashlib.blake2b(content, digest_size=16).hexdigest()}"
    return os.fspath(image) if isinstance(image, str | os.PathLike) else image.name


def missing_image(name: str, sample_id: str) -> DataError:
    """The error for an image that is not there; it names a file that may be meant."""
    near = similar_file(name)
    hint = f"; {near!r} is there: is that what is meant?" if near else ""
    if os.path.islink(name):
        hint = f"; that is a link to {os.readlink(name)}, which is not there"
    parts = Path(name).parts
    for n, (one, other) in enumerate(itertools.pairwise(parts)):
        if one == other and (once := Path(*parts[:n], *parts[n + 1 :])).is_file():
            hint = f"; {once} is there: name the folder above in sources.images, since the name begins with {one}/"
    return DataError(f"there is no image {name}{hint}", sample_id)


def similar_file(path: str | os.PathLike[str]) -> str:
    """The name of a file beside a missing one that differs in its ending or in capitals alone; "" if there is none."""
    place = Path(path)
    try:
        return _names_by_stem(str(place.parent), place.parent.stat().st_mtime_ns).get(place.stem.lower(), "")
    except (OSError, ValueError):
        return ""


@lru_cache(maxsize=8)
def _names_by_stem(folder: str, modified: int) -> dict[str, str]:
    """A folder's files by name without ending, in small letters; listed once while it stays as it is."""
    del modified
    return {Path(entry.name).stem.lower(): entry.name for entry in os.scandir(folder)}


def _padded(image: Image.Image, mean: Sequence[float], sample_id: str) -> Image.Image:
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    _check_pixels(side * side, f"{width} x {height} pixels become {side} x {side} when padded", sample_id)
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An image of another size (width, height), bicubically."""
    return image if image.size == size else image.resize(size, resample=Image.Resampling.BICUBIC)
