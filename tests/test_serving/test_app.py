"""The server over real connections: the protocol, its limits, and clients that misbehave."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from saisa_jax.inference.chat import Chat
from saisa_jax.serving.app import Server, Settings
from saisa_jax.serving.background import in_background
from saisa_jax.serving.pictures import PictureLimits

HEADERS = {"Content-Type": "application/json", "Authorization": "Bearer secret"}


class Running:
    """A server, and what its clients do."""

    def __init__(self, routes: Server, url: str) -> None:
        self.routes, self.engine, self.port = routes, routes.engine, int(url.rpartition(":")[2])

    def send(self, body: Any, path: str = "/v1/chat/completions", headers: Any = HEADERS) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request("GET" if body is None else "POST", path, content, headers)
        return connection.getresponse()

    def ask(self, body: Any, path: str = "/v1/chat/completions", headers: Any = HEADERS) -> tuple[int, Any]:
        response = self.send(body, path, headers)
        return response.status, json.loads(response.read())

    def settled(self) -> bool:
        """Waits until no row is in use and no request is open."""
        end = time.monotonic() + 20
        busy = lambda: self.engine.busy or self.engine.waiting or self.routes.open  # noqa: E731
        while busy() and time.monotonic() < end:
            time.sleep(0.01)
        return not busy()


@pytest.fixture(scope="module")
def server(engine: Any) -> Iterator[Running]:
    pictures = PictureLimits(file_bytes=100_000, pixels=10_000)
    routes = Server(engine, Settings("tiny", 2, 20.0, 400_000, 8, pictures, api_key="secret"))
    with in_background(routes) as url:
        yield Running(routes, url)


@pytest.fixture(autouse=True)
def nothing_leaks(server) -> Iterator[None]:
    yield
    assert server.settled()


def url_of(picture: Any) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def messages(*parts: Any) -> list[dict[str, Any]]:
    """A user's message: strings, and pictures."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": url_of(part)}}
        for part in parts
    ]  # fmt: skip
    return [{"role": "user", "content": content}]


def events(response: http.client.HTTPResponse) -> list[Any]:
    lines = response.read().decode().split("\n\n")
    assert lines[-1] == "" and all(line.startswith("data: ") for line in lines[:-1])
    return [json.loads(line[6:]) if line != "data: [DONE]" else "done" for line in lines[:-1]]


LONG = {"messages": [{"role": "user", "content": "is it red?"}], "max_tokens": 80, "temperature": 3.0, "seed": 1}


def test_whole_and_streamed_answers_are_those_of_a_conversation(server, model, pictures):
    chat = Chat(model)
    for picture in pictures[:2]:
        chat.add_image(picture)
    expected = "".join(chat.ask("is\n<image>\nlike\n<image>\n?", 12))
    body = {"model": "tiny", "messages": messages("is", pictures[0], "like", pictures[1], "?"), "temperature": 0}
    status, whole = server.ask(body | {"max_tokens": 12})
    assert status == 200 and whole["choices"][0]["message"] == {"role": "assistant", "content": expected}
    assert whole["choices"][0]["finish_reason"] == "length" and whole["object"] == "chat.completion"
    usage = whole["usage"]
    assert usage["completion_tokens"] == 12 and usage["prompt_tokens"] > 32
    assert usage["prompt_tokens_details"] == {"cached_tokens": 32}

    stream = {"max_completion_tokens": 12, "stream": True, "stream_options": {"include_usage": True}}
    response = server.send(body | stream)
    assert response.headers["content-type"].startswith("text/event-stream")
    *pieces, end, last, done = events(response)
    assert "".join(piece["choices"][0]["delta"]["content"] for piece in pieces) == expected and len(pieces) > 5
    assert pieces[0]["choices"][0]["delta"]["role"] == "assistant"
    assert end["choices"][0]["finish_reason"] == "length" and last["usage"] == usage and done == "done"
    assert len({piece["id"] for piece in (*pieces, end, last)}) == 1


def test_an_answer_without_a_length_is_the_servers_and_one_too_long_ends(server):
    short = {name: value for name, value in LONG.items() if name != "max_tokens"}
    assert server.ask(short)[1]["usage"]["completion_tokens"] <= 8
    usage = server.ask(LONG | {"max_tokens": 10**9, "temperature": 0})[1]["usage"]
    assert usage["total_tokens"] <= 128


def test_the_openai_client(server, pictures):
    import openai

    options = {"base_url": f"http://127.0.0.1:{server.port}/v1", "api_key": "secret", "max_retries": 0}
    asked: Any = {"model": "tiny", "messages": messages(pictures[0], "is it red?"), "temperature": 0, "max_tokens": 6}
    with openai.OpenAI(**options) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"
        text = client.chat.completions.create(**asked).choices[0].message.content
        stream = client.chat.completions.create(**asked, stream=True)
        assert text and "".join(piece.choices[0].delta.content or "" for piece in stream) == text
        with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served"):
            client.chat.completions.create(**asked | {"model": "gpt-4"})
        with pytest.raises(openai.BadRequestError, match="one answer"):
            client.chat.completions.create(**asked, n=2)

    async def several() -> list[str | None]:
        async with openai.AsyncOpenAI(**options) as client:
            answers = await asyncio.gather(*(client.chat.completions.create(**asked) for _ in range(4)))
        return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(several()) == [text] * 4


def test_other_routes(server):
    assert server.ask(None, "/health", {}) == (200, {"status": "ok"})
    status, told = server.ask(None, "/v1/models")
    assert status == 200 and told["data"][0]["id"] == "tiny" and told["data"][0]["max_model_len"] == 128
    assert server.ask(None, "/v1/models/gpt-4")[0] == 404
    metrics = server.send(None, "/metrics", {}).read().decode()
    assert "saisa_jax_rows 3.0" in metrics and 'saisa_jax_requests_total{status="200"}' in metrics
    page = server.send(None, "/", {})
    text = page.read().decode()
    assert "default-src 'none'" in page.headers["content-security-policy"] and "<title>" in text
    assert "http://" not in text and "https://" not in text  # it works offline
    assert server.ask(None, "/v1/embeddings")[0] == 404
    assert server.ask(None, "/v1/chat/completions")[0] == 405


@pytest.mark.parametrize(
    "body, headers, status, said",
    [
        ({}, {}, 400, "messages is a list"),
        (b'{"messages": [', {}, 400, "is not JSON"),
        (b"[" * 100_000, {}, 400, "is not JSON"),
        ({"messages": messages("red " * 200)}, {}, 400, "exceed model.max_length=128"),
        ({"messages": messages(" ")}, {}, 400, "the question is empty"),
        ({"messages": [*messages("a"), *messages("b")]}, {}, 400, "are both of 'user'"),
        ({"messages": [{"role": "assistant", "content": "a"}, *messages("b")]}, {}, 400, "starts with 'assistant'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "file:///etc/passwd"},
                                                   {"type": "text", "text": "x"}]}]}, {}, 400, "is a data URL"),
        (bytes(400_001), {}, 413, "more than 400,000 bytes"),
        (LONG, {"Content-Type": "text/plain"}, 415, "application/json"),
        (LONG, {"Authorization": "Bearer wrong"}, 401, "API key"),
        (LONG, {"Authorization": ""}, 401, "API key"),
    ],
)  # fmt: skip
def test_errors(server, body, headers, status, said):
    got, told = server.ask(body, headers=HEADERS | headers)
    assert got == status and said in told["error"]["message"], told
    assert set(told["error"]) == {"message", "type", "param", "code"}


def test_pictures_that_are_refused(server, pictures):
    large = pictures[0].resize((101, 100))
    for parts, said in (
        ((large, "x"), "picture 1: a picture of 101 x 100 pixels; at most 10,000"),
        ((*pictures[:3], "x"), "3 pictures; at most 2 are taken"),
    ):
        status, told = server.ask({"messages": messages(*parts), "max_tokens": 2})
        assert status == 400 and said in told["error"]["message"], told


@contextlib.contextmanager
def held(server: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Steps of decoding wait for the event."""
    go, step = threading.Event(), server.engine.rows.step
    monkeypatch.setattr(server.engine.rows, "step", lambda *args: (go.wait(20), step(*args))[1])
    try:
        yield go
    finally:
        go.set()


def test_a_full_queue(server, monkeypatch):
    with held(server, monkeypatch) as go:
        asked = [threading.Thread(target=server.ask, args=(LONG,)) for _ in range(5)]
        for thread in asked:
            thread.start()
        end = time.monotonic() + 20
        while server.engine.busy + server.engine.waiting < 5 and time.monotonic() < end:
            time.sleep(0.01)
        response = server.send(LONG)
        told = json.loads(response.read())
        assert response.status == 429 and response.headers["Retry-After"] == "1"
        assert told["error"]["code"] == "queue_full" and server.routes.open == 5
        go.set()
        for thread in asked:
            thread.join(20)
    assert server.ask(LONG)[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(server, monkeypatch, stream):
    with held(server, monkeypatch) as go:
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            body = json.dumps(LONG | {"stream": stream}).encode()
            head = "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items())
            raw.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{head}Content-Length: {len(body)}\r\n\r\n"
                        .encode() + body)  # fmt: skip
            if stream:
                assert raw.recv(100).startswith(b"HTTP/1.1 200")
            end = time.monotonic() + 20
            while not server.engine.busy and time.monotonic() < end:
                time.sleep(0.01)
        end = time.monotonic() + 20
        while server.routes.open and time.monotonic() < end:
            time.sleep(0.01)
        assert not server.routes.open
        before = server.engine.generated_tokens
        go.set()
        assert server.settled()
        assert server.engine.generated_tokens - before <= 2  # the step that was under way


def test_a_body_that_is_cut_in_the_middle(server):
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        head = "".join(f"{name}: {value}\r\n" for name, value in (HEADERS | {"Content-Length": "500"}).items())
        raw.sendall(f'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{head}\r\n{{"messages": ['.encode())
        end = time.monotonic() + 20
        while not server.routes.open and time.monotonic() < end:
            time.sleep(0.01)
        assert server.routes.open == 1
    assert server.settled()
    assert server.ask(LONG)[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_answers_that_fail_or_take_too_long(server, monkeypatch, stream):
    def fails(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(server.engine.rows, "read", fails)
        status, told = server.ask(LONG | {"stream": stream})
        assert status == 500 and told["error"]["type"] == "server_error" and "memory" not in str(told)
    with monkeypatch.context() as patch:
        patch.setattr(server.routes, "settings", Settings("tiny", seconds=0.001, api_key="secret"))
        status, told = server.ask(LONG)
        assert status in (408, 504), told
    with monkeypatch.context() as patch:  # in mid-stream, when the status was sent
        step, times = server.engine.rows.step, iter(range(100))
        patch.setattr(server.engine.rows, "step", lambda *args: step(*args) if next(times) < 5 else fails())
        if stream:
            assert events(server.send(LONG | {"stream": True}))[-1]["error"]["code"] == "internal_error"
        else:
            assert server.ask(LONG)[0] == 500
    assert server.ask(LONG)[0] == 200


def test_many_clients_get_what_each_gets_alone(server, pictures):
    asked = [
        {"messages": messages(pictures[n % 4], "what color is it?"[: 8 + n]), "max_tokens": 3 + n % 7, "seed": n,
         "temperature": float(n % 2)} for n in range(12)
    ]  # fmt: skip
    alone = [server.ask(body)[1]["choices"] for body in asked]
    together: dict[int, Any] = {}

    def client(number: int) -> None:
        for body in range(number, len(asked), 4):  # four at a time: the queue is short
            together[body] = server.ask(asked[body])[1].get("choices")

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [together[n] for n in range(len(asked))] == alone


def test_attention_of_an_answer(server, model, pictures, monkeypatch):
    asked = messages(pictures[0], pictures[1], "is it red?")
    status, told = server.ask({"messages": [*asked, {"role": "assistant", "content": "no red"}]}, "/v1/attention")
    assert status == 200 and "".join(told["pieces"]) == "no red" and told["side"] == 4 and len(told["pictures"]) == 2
    count, layers = len(told["pieces"]), told["layers"]
    maps = np.frombuffer(base64.b64decode(told["maps"]), np.uint8).reshape(count, layers, 2, 16)
    assert (maps.max(axis=(2, 3)) == 255).all() and np.shape(told["share"]) == (count, layers)
    first = model.attention("is it red?", pictures[:2])
    np.testing.assert_allclose(told["share"][0], first.sum(axis=1), atol=1e-3)
    np.testing.assert_array_equal(maps[0].reshape(layers, -1).argmax(axis=1), first.argmax(axis=1))
    assert server.ask({"messages": asked}, "/v1/attention")[0] == 400
    monkeypatch.setattr("saisa_jax.inference.memory.free_bytes", lambda devices: 2**16)
    status, told = server.ask({"messages": [*asked, {"role": "assistant", "content": "no red"}]}, "/v1/attention")
    assert status == 400 and "GiB are free: shorten the conversation" in told["error"]["message"]
