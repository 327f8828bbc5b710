"""Pictures of requests: where they may come from, and how large they may be, which is known before they are decoded."""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from saisa_jax.data.sample import DataError
from saisa_jax.inference.image_cache import EncodedImage
from saisa_jax.inference.model import VisionLanguageModel
from saisa_jax.inference.pictures import picture

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


@dataclass(frozen=True)
class PictureLimits:
    """What is taken.

    Attributes:
      file_bytes: of a picture's file.
      pixels: of a picture.
      hosts: from which pictures are fetched: names as they stand in the URL. None: data URLs alone.
      seconds: of a fetch.
    """

    file_bytes: int = 20 * 10**6
    pixels: int = 40 * 10**6
    hosts: frozenset[str] = frozenset()
    seconds: float = 10.0


def read_pictures(model: VisionLanguageModel, urls: Sequence[str], limits: PictureLimits) -> list[EncodedImage]:
    """The pictures of a request, which errors number from 1; args and errors as of `read_picture`."""
    return [read_picture(model, url, limits, f"picture {number}") for number, url in enumerate(urls, start=1)]


def read_picture(model: VisionLanguageModel, url: str, limits: PictureLimits, name: str) -> EncodedImage:
    """A picture as prepared for the model's encoder.

    Args:
      model: that is to see it.
      url: a data URL, or with `limits.hosts` one of http or https.
      limits: within which it is read.
      name: for errors.

    Raises:
      DataError: it may not be read, or cannot be.
    """
    model.check_sees((url,), name)
    content = _bytes(url, limits, name)
    if len(content) > limits.file_bytes:
        raise DataError(f"a picture of {len(content):,} bytes; at most {limits.file_bytes:,} are taken", name)
    _check_header(content, limits, name)
    return EncodedImage.of_views(model.loader(content, name))


def _bytes(url: str, limits: PictureLimits, name: str) -> bytes:
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        content = picture(url, name)
        assert isinstance(content, bytes)
        return content
    if scheme not in ("http", "https"):
        raise DataError(f"a picture is a data URL (data:image/png;base64,...), not {url[:60]!r}", name)
    if _host(url) not in limits.hosts:
        known = f"are fetched from {', '.join(sorted(limits.hosts))} alone" if limits.hosts else "are not fetched"
        raise DataError(f"{url[:60]!r}: pictures {known} (--allow_hosts); send a data URL", name)
    return fetch(url, limits, name)


def _host(url: str) -> str:
    try:
        return urllib.parse.urlsplit(url).hostname or ""
    except ValueError:  # brackets that are no address
        return ""


def _check_header(content: bytes, limits: PictureLimits, name: str) -> None:
    """Format and size, of the file's first bytes."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise DataError(f"a picture of too many pixels; at most {limits.pixels:,} are decoded", name) from error
    except Exception as error:  # PIL's readers raise almost anything on broken files
        raise DataError(f"a picture that is none of {', '.join(FORMATS)}, or is broken", name) from error
    if width * height > limits.pixels:
        raise DataError(f"a picture of {width} x {height} pixels; at most {limits.pixels:,} are decoded", name)


# --- other machines --------------------------------------------------------------------------------------------------


def is_public(address: str) -> bool:
    """Whether an address belongs to the internet: not to this machine, its network, or a cloud's metadata."""
    found = ipaddress.ip_address(address)
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_global and not found.is_multicast


def _connect(where: tuple[str, int], timeout: float, *rest: Any) -> socket.socket:
    """A connection to a public address of a host; what was checked is what is connected to."""
    del rest
    found = [info[4][:2] for info in socket.getaddrinfo(*where, type=socket.SOCK_STREAM)]
    if inside := [str(address) for address, _ in found if not is_public(str(address))]:
        raise OSError(f"{where[0]} is {inside[0]}, which is no public address")
    return socket.create_connection((str(found[0][0]), int(found[0][1])), timeout)


def fetch(url: str, limits: PictureLimits, name: str) -> bytes:
    """What stands at an http or https URL of a public address. No redirect is followed, and no proxy is asked.

    Raises:
      DataError: it cannot be fetched within the limits.
    """
    parts, end = urllib.parse.urlsplit(url), time.monotonic() + limits.seconds
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    content = bytearray()
    try:
        connection: Any = kind(parts.hostname or "", parts.port, timeout=limits.seconds)
        connection._create_connection = _connect  # http.client has no public place for it
        try:
            path = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
            connection.request("GET", path, headers={"User-Agent": "saisa_jax"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise ValueError(f"status {answer.status} {answer.reason}")
            while chunk := answer.read1(2**16):
                content += chunk
                if len(content) > limits.file_bytes:
                    raise ValueError(f"it has more than {limits.file_bytes:,} bytes")
                if time.monotonic() > end:
                    raise ValueError(f"it takes longer than {limits.seconds:g} s")
        finally:
            connection.close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DataError(f"{url[:200]} cannot be fetched: {error or type(error).__name__}", name) from error
    return bytes(content)
