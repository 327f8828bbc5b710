"""Pictures of requests: what is refused is refused before it is decoded, and nothing private is fetched."""

from __future__ import annotations

import base64
import http.server
import io
import struct
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from saisa_jax.data.sample import DataError
from saisa_jax.serving import pictures as serving_pictures
from saisa_jax.serving.pictures import PictureLimits, is_public, read_picture


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of few bytes and many pixels, whose pixels are never read."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_formats(model, pictures, kind):
    seen = read_picture(model, data_url(encoded(pictures[0], kind)), PictureLimits(), "picture 1")
    assert seen.pixels.shape == (32, 32, 3) and seen.kv is None
    if kind == "PNG":
        assert np.array_equal(seen.pixels, model.encode_images([pictures[0]])[0].pixels)


@pytest.mark.parametrize(
    "url, said",
    [
        (data_url(bomb(7_000)), "7000 x 7000 pixels; at most 40,000,000"),
        (data_url(bomb(50_000)), "too many pixels; at most 40,000,000"),
        (data_url(b"x" * 2000), "none of PNG"),
        (data_url(encoded(Image.new("RGB", (9, 9)), "BMP")), "none of PNG"),
        (data_url(encoded(Image.new("RGB", (99, 99)))[:50]), "picture 1"),
        (data_url(bytes(20_001)), "20,001 bytes; at most 20,000"),
        ("data:image/png;base64,@@", "cannot be read"),
        ("data:image/png,abc", "not in base64"),
        ("file:///etc/passwd", "is a data URL"),
        ("/etc/passwd", "is a data URL"),
        ("http://169.254.169.254/latest", "are not fetched"),
        ("http://[x", "are not fetched"),
    ],
)
def test_what_is_refused(model, url, said):
    with pytest.raises(DataError, match="picture 1") as caught:
        read_picture(model, url, PictureLimits(file_bytes=20_000), "picture 1")
    assert said in str(caught.value)


@pytest.mark.parametrize("address", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "fd00::1", "::ffff:10.0.0.1",
                                     "0.0.0.0", "100.64.0.1", "224.0.0.1"])  # fmt: skip
def test_private_addresses(address):
    assert not is_public(address)


@pytest.fixture(scope="module")
def site(pictures) -> Iterator[str]:
    """A machine with a picture, something too large, and a redirect."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            large, moved = self.path == "/large", self.path == "/moved"
            content = bytes(50_000) if large else encoded(pictures[0])
            self.send_response(302 if moved else 200)
            self.send_header("Location", "/a.png")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()


def test_fetching(model, site, pictures, monkeypatch):
    limits = PictureLimits(file_bytes=20_000, hosts=frozenset({"localhost"}))
    with pytest.raises(DataError, match="no public address"):  # an allowed name that leads inside
        read_picture(model, f"{site}/a.png", limits, "picture 1")
    with pytest.raises(DataError, match="are fetched from localhost alone"):
        read_picture(model, site.replace("localhost", "127.0.0.1"), limits, "picture 1")
    monkeypatch.setattr(serving_pictures, "is_public", lambda address: True)
    seen = read_picture(model, f"{site}/a.png?x=1", limits, "picture 1")
    assert seen.key == model.encode_images([pictures[0]])[0].key
    for path, said in (("large", "more than 20,000 bytes"), ("moved", "status 302")):
        with pytest.raises(DataError, match=said):
            read_picture(model, f"{site}/{path}", limits, "picture 1")
