"""Pictures as arrays and tensors, and from the web: read in one way, or refused."""

from __future__ import annotations

import http.server
import io
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from saisa_jax.data.sample import DataError
from saisa_jax.inference import pictures
from saisa_jax.inference.pictures import picture

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
FORMS = {
    "as it is": lambda x: x,
    "colours first": lambda x: x.transpose(2, 0, 1),
    "floats": lambda x: x.astype(np.float32) / 255,
    "doubles, colours first": lambda x: x.transpose(2, 0, 1) / 255,
    "jax": jnp.asarray,
}


@pytest.mark.parametrize("form", FORMS)
def test_arrays(form: str) -> None:
    np.testing.assert_array_equal(np.asarray(picture(FORMS[form](PIXELS))), PIXELS)


def test_halves() -> None:
    """As exact as eight bits of mantissa are."""
    for dtype in (np.float16, ml_dtypes.bfloat16):
        seen = np.asarray(picture((PIXELS / 255).astype(dtype))).astype(int)
        assert np.abs(seen - PIXELS).max() <= 1


def test_tensors() -> None:
    torch = pytest.importorskip("torch", reason="CPU torch is not installed")
    for tensor in (
        torch.tensor(PIXELS),
        torch.tensor(PIXELS).permute(2, 0, 1),
        torch.tensor(PIXELS).permute(2, 0, 1) / 255,  # torchvision's ToTensor
        torch.nn.Parameter(torch.tensor(PIXELS).permute(2, 0, 1) / 255),
    ):
        np.testing.assert_array_equal(np.asarray(picture(tensor)), PIXELS)
    half = np.asarray(picture((torch.tensor(PIXELS) / 255).to(torch.bfloat16))).astype(int)
    assert np.abs(half - PIXELS).max() <= 1


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (PIXELS.astype(np.float32), r"is in 0\.\.1, and this one \(float32 \[5, 4, 3\]\) in .*: give uint8"),
        (PIXELS / 127.5 - 1, r"in -0\.\d+\.\.0\.\d+: .*normalised for another model"),
        (np.full((5, 4, 3), np.nan), r"in nan\.\.nan"),
        (PIXELS.astype(np.int64), "uint8, or floats in 0..1, not int64"),
        (np.zeros((5, 4, 3), bool), "not bool"),
        (PIXELS[:, :, 0], r"not uint8 \[5, 4\]"),
        (PIXELS[:, :, :1], r"not uint8 \[5, 4, 1\]"),
        (PIXELS[None], r"not uint8 \[1, 5, 4, 3\]; it is several pictures"),
        (PIXELS[:3], r"uint8 \[3, 4, 3\] may have its colours first or last"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(array: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        picture(array, "q")


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
            return
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/a.png")
            self.end_headers()
            return
        self.send_response(404 if self.path == "/none" else 200)
        self.end_headers()
        if self.path == "/slow":
            for _ in range(50):
                self.wfile.write(b"x")
                time.sleep(0.02)
        elif self.path == "/large":
            self.wfile.write(b"x" * 3000)
        else:
            file = io.BytesIO()
            Image.fromarray(PIXELS).save(file, "PNG")
            self.wfile.write(file.getvalue())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def site() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_urls_only_by_a_flag_and_within_limits(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(DataError, match=r"nothing is fetched.*allow_urls=True"):
        picture(f"{site}/a.png")
    for path in ("/a.png", "/moved"):
        content = picture(f"{site}{path}", allow_urls=True)
        assert isinstance(content, bytes)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), PIXELS)
    monkeypatch.setattr(pictures, "URL_BYTES", 2000)
    monkeypatch.setattr(pictures, "URL_SECONDS", 0.2)
    for path, said in (
        ("/none", "404"),
        ("/large", "larger than"),
        ("/slow", "takes longer than 0.2 s"),
        ("/away", "cannot be fetched"),
    ):
        with pytest.raises(DataError, match=f"{site}{path} cannot be fetched: .*{said}" if said[0] != "c" else said):
            picture(f"{site}{path}", allow_urls=True)
    with pytest.raises(DataError, match="cannot be fetched"):
        picture("http://127.0.0.1:9/a.png", allow_urls=True)
