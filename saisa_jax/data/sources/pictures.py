"""A record's images, and the fields with images that are not supported."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable
from urllib.parse import unquote

from saisa_jax.data.sample import DataError, ImageSource

OBJECT_KEYS = ("bytes", "base64", "data", "image", "path", "url", "image_url", "source")  # of which an object has one
UNSERVED = ("video", "videos", "audio", "audios", "tools", "tool_calls", "function_call", "functions")

# How the text of an encoded JPEG, PNG, GIF or WebP file begins; paths are shorter, and have an ending.
_BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
_SHORTEST_BASE64 = 200
_NAMES = r"(image|img|picture|photo)s?"
_PICTURE_KEY = re.compile(rf"{_NAMES}(_?(path|file|name|filename|url|uri|bytes|data|base64|list)s?)?", re.IGNORECASE)
_FURTHER_KEY = re.compile(rf"{_NAMES}_?(\d+|[a-z])", re.IGNORECASE)
_PICTURE_NAME = re.compile(r"data:image/.*|\S.*\.(jpe?g|png|gif|webp|bmp|tiff?|ppm)", re.IGNORECASE | re.DOTALL)


@runtime_checkable
class Images(Protocol):
    """Where names of images lead (`archives.open_images`)."""

    def find(self, name: str, sample_id: str, /) -> ImageSource: ...


def find_picture(given: Any, where: str, images: Images, allow_absolute: bool, sample_id: str) -> ImageSource:
    """The image that a record gives: a name, a data URL, a file in base64, or an object with one of those.

    Args:
      given: `"a.jpg"`, `"data:image/png;base64,..."`, `{"path": "a.jpg"}`, `{"image": ...}`, `{"url": ...}`,
        `{"bytes": base64}`.
      where: the field, for errors.
      images: where names lead.
      allow_absolute: take absolute names as they are.
      sample_id: for errors.

    Raises:
      DataError: a URL of another machine, broken base64, an object without an image or with several, a name that
        leads out of `images`.
    """
    if isinstance(given, dict):
        keys = [key for key in OBJECT_KEYS if given.get(key) is not None]
        if keys and keys[0] == "bytes" and keys[1:] == ["path"]:  # as `datasets` writes an image: the path is a remark
            keys = ["bytes"]
        if len(keys) != 1:
            seen = f"gives {' and '.join(keys)}" if keys else f"has {', '.join(map(str, given)) or 'no key'}"
            raise DataError(f"{where} {seen}; one of {', '.join(OBJECT_KEYS)} names an image", sample_id)
        (key,) = keys
        if key in ("bytes", "base64", "data") and isinstance(given[key], str) and not given[key].startswith("data:"):
            return _decoded(given[key], f"{where}.{key}", sample_id)
        return find_picture(given[key], f"{where}.{key}", images, allow_absolute, sample_id)
    if isinstance(given, bytes):  # JSON has none
        return given
    if not isinstance(given, str):
        raise DataError(f"{where} should be text or an object, and is of type {type(given).__name__}", sample_id)
    if given.startswith("data:"):
        head, comma, content = given.partition(",")
        if not comma or not head.endswith(";base64"):
            raise DataError(f"{where} is a data URL that is not in base64: {given[:40]!r}", sample_id)
        return _decoded(content, where, sample_id)
    if len(given) > _SHORTEST_BASE64 and "." not in given and given.startswith(_BASE64_STARTS):
        return _decoded(given, where, sample_id)
    if given.startswith("file://"):
        given = unquote(given.removeprefix("file://"))
    if "://" in given:
        raise DataError(
            f"{where}={given[:200]!r} is a URL, and nothing is fetched while training: download it, and give its name "
            "within sources.images",
            sample_id,
        )
    if given.startswith("/") and allow_absolute and "\0" not in given:
        return given
    return images.find(given, sample_id)


def _decoded(content: str, where: str, sample_id: str) -> bytes:
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where} is not an image in base64: {error}", sample_id) from error


def check_unread(
    fields: Mapping[str, Any], read: Iterable[str], where: str, has_pictures: bool, sample_id: str
) -> None:
    """Refuses an object of a record whose other fields hold what would be left out without a word.

    Videos, audio and tools are not served. A picture in a field that is not read is refused where the sample has none
    otherwise, or where the field names a further one (`image2`); beside a picture, `image_url` and the like say where
    that one came from.

    Args:
      fields: the record, or one turn or part of it.
      read: its fields that are read.
      where: its name with a dot after it, or nothing, for errors.
      has_pictures: whether the sample has pictures that are read.
      sample_id: for errors.

    Raises:
      DataError: such a field; the message names it.
    """
    read = tuple(read)
    for key, value in fields.items():
        if key in read or _is_empty(value):
            continue
        if key.lower() in UNSERVED:
            raise DataError(f"{where}{key} is not served: text and images are; leave such samples out", sample_id)
        further = bool(_FURTHER_KEY.fullmatch(key))
        named = bool(_PICTURE_KEY.fullmatch(key)) or (key != "id" and _looks_like_picture(value))
        if further or (named and not has_pictures):
            raise DataError(
                f"{where}{key} holds a picture, and is not read: name a sample's pictures in 'image' or 'images' of "
                "the record (chat: or in parts of type 'image')",
                sample_id,
            )


def _is_empty(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str) and value.strip() in ("", "[]", "{}")) or (
        isinstance(value, list | dict) and not value
    )  # fmt: skip


def _looks_like_picture(value: Any) -> bool:
    if isinstance(value, str):
        return bool(_PICTURE_NAME.fullmatch(value))
    if isinstance(value, dict):
        return any(_looks_like_picture(value.get(key)) for key in OBJECT_KEYS)
    return isinstance(value, list) and bool(value) and all(map(_looks_like_picture, value))
