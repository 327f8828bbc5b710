"""Clients of a server, in a process of their own: they take no time from the server's threads.

python -m saisa_jax.bench.clients < LOAD > TIMES    # JSON, as `bench serve` writes and reads it
"""

from __future__ import annotations

import base64
import http.client
import io
import itertools
import json
import sys
import threading
import time
import urllib.parse
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Load:
    """What is asked.

    Attributes:
      url: of the server.
      clients: that ask at once, each when its last answer has ended.
      requests: of all clients.
      pictures: different ones, asked about in turn.
      first_picture: the number of the first: another number is another picture.
      size: pixels of a side.
      tokens: of every answer; end tokens are ignored.
      question: about every picture.
    """

    url: str
    clients: int
    requests: int
    pictures: int
    first_picture: int
    size: int
    tokens: int
    question: str


@dataclass(frozen=True)
class Answered:
    """An answer: when it was asked for, when its first text and its end came, in seconds, and its tokens."""

    asked: float
    first: float
    ended: float
    tokens: int


def noise(number: int, size: int) -> Image.Image:
    """A picture that compresses badly, as photographs do."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8))


def run(load: Load) -> list[Answered]:
    """Asks all questions.

    Raises:
      RuntimeError: one was not answered.
    """
    bodies = [_body(load, load.first_picture + number) for number in range(load.pictures)]
    numbers, lock = itertools.count(), threading.Lock()
    answered: list[Answered] = []
    failed: list[Exception] = []

    def client() -> None:
        while not failed:
            with lock:
                number = next(numbers)
            if number >= load.requests:
                return
            try:
                answered.append(_ask(load.url, bodies[number % len(bodies)]))
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=client) for _ in range(load.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise RuntimeError(f"a question was not answered: {failed[0]}") from failed[0]
    return answered


def _body(load: Load, number: int) -> bytes:
    file = io.BytesIO()
    noise(number, load.size).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": load.question}]
    fields = {"max_tokens": load.tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    return json.dumps(
        {"messages": [{"role": "user", "content": content}], "stream_options": {"include_usage": True}, **fields}
    ).encode()


def _ask(url: str, body: bytes) -> Answered:
    where = urllib.parse.urlsplit(url)
    asked, first, tokens = time.perf_counter(), 0.0, 0
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=600)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {response.read()[:500]!r}")
    for line in response:
        if line.startswith(b"data: {"):
            piece = json.loads(line[6:])
            if "error" in piece:
                raise RuntimeError(piece["error"]["message"])
            first = first or time.perf_counter()
            tokens = (piece.get("usage") or {}).get("completion_tokens", tokens)
    connection.close()
    return Answered(asked, first, time.perf_counter(), tokens)


if __name__ == "__main__":
    print(json.dumps([asdict(answered) for answered in run(Load(**json.load(sys.stdin)))]))
