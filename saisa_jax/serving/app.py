"""The server's routes: a request's body becomes a question, and the engine's events become a response.

A request is counted from its first byte to the end of its answer, and more of them than there are rows and places in
the queue are refused before their bodies are kept. Bodies are parsed, pictures decoded and prompts tokenised in a few
threads beside the event loop. A client that leaves, in whatever state, frees its row with the next step.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from absl import logging
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from saisa_jax.data.sample import DataError, TooLongError
from saisa_jax.inference.chat import MAX_NEW_TOKENS
from saisa_jax.serving import page
from saisa_jax.serving.metrics import Metrics
from saisa_jax.serving.pictures import PictureLimits, read_pictures
from saisa_jax.serving.protocol import (
    INVALID,
    Answer,
    ChatRequest,
    ProtocolError,
    Usage,
    bad,
    model_card,
    read_body,
    read_request,
    said_of,
    server_sent,
    unknown_model,
)
from saisa_jax.serving.questions import Answers, Ended, Event, Failed, OverdueError, Question, Said, UnavailableError

LEFT = 499  # nginx' status of a client that closed the connection


@dataclass(frozen=True)
class Settings:
    """What a server allows.

    Attributes:
      name: of the model, in requests.
      queue: requests that may wait, beside those in rows.
      seconds: from a request's first byte to the end of its answer.
      body_bytes: of a request.
      max_new_tokens: of an answer that says nothing itself.
      pictures: where they may come from, and how large they may be.
      api_key: that clients must send; "": none.
      threads: that read bodies and pictures.
    """

    name: str
    queue: int = 64
    seconds: float = 300.0
    body_bytes: int = 64 * 10**6
    max_new_tokens: int = MAX_NEW_TOKENS
    pictures: PictureLimits = field(default_factory=PictureLimits)
    api_key: str = ""
    threads: int = 4


@dataclass
class _Heard:
    """The events of a ticket, in the event loop."""

    events: asyncio.Queue[Event]
    cancel: Callable[[], None]
    prompt: int


class Server:
    """The routes over one engine.

    Args:
      engine: that answers; the caller starts and drains it.
      settings: what is allowed.
    """

    def __init__(self, engine: Answers, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.metrics = Metrics(engine)
        self.open = 0  # requests for answers that have not ended
        self._created = int(time.time())
        self._drawing = asyncio.Lock()  # one at a time: the weights of all layers are large
        self._pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="reader")

    def app(self) -> Starlette:
        """As an ASGI application."""
        served = {
            "/v1/chat/completions": (self.chat, "POST"),
            "/v1/models": (self.models, "GET"),
            "/v1/models/{name:path}": (self.one_model, "GET"),
            "/v1/attention": (self.attention, "POST"),
        }
        routes = [Route(path, self._guarded(handle), methods=[method]) for path, (handle, method) in served.items()]
        routes += [Route("/", self.page), Route("/health", self.health), Route("/metrics", self.measured)]
        return Starlette(routes=routes, exception_handlers={HTTPException: _no_such_route})

    # --- routes -------------------------------------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        del request
        return Response(page.html(), media_type="text/html", headers=page.HEADERS)

    async def health(self, request: Request) -> Response:
        """200 when questions are taken; 503 while programs are compiled, at the end, and if the engine died."""
        del request
        engine, (done, levels) = self.engine, self.engine.warmed
        if engine.ready.is_set() and engine.alive and not engine.closing:
            return JSONResponse({"status": "ok"})
        state = "shutting down" if engine.closing else "compiling" if engine.alive else "stopped"
        return JSONResponse({"status": state, "compiled": done, "sizes": levels}, 503)

    async def measured(self, request: Request) -> Response:
        del request
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        del request
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def one_model(self, request: Request) -> Response:
        if request.path_params["name"] != self.settings.name:
            raise unknown_model(request.path_params["name"], self.settings.name)
        return JSONResponse(self._card())

    async def chat(self, request: Request) -> Response:
        if self.open >= self.engine.count + self.settings.queue:
            await self._read(request, keep=False)
            wait = {"Retry-After": "1"}
            raise ProtocolError(429, "the queue is full: try again", None, "queue_full", "rate_limit_error", wait)
        self.open += 1
        with contextlib.ExitStack() as closing:
            closing.callback(self._close)
            start = time.monotonic()
            asked = await self._in_thread(self._request, await self._read(request))
            question = await self._in_thread(self._question, asked, start + self.settings.seconds)
            heard = self._submit(question)
            closing.callback(heard.cancel)
            if not asked.stream:
                return await self._whole(request, heard, start)
            first = await _unless_left(request, heard.events.get())
            if isinstance(first, Failed):
                raise _failure(first.error)
            return _Stream(self._stream(heard, first, start, asked.include_usage), closing.pop_all())

    async def attention(self, request: Request) -> Response:
        """What an answer's words read of the pictures: not part of the protocol, for the page."""
        body = read_body(await self._read(request))
        async with self._drawing:
            return JSONResponse(await self._in_thread(page.attention, self.engine.model, body, self.settings.pictures))

    # --- a question ---------------------------------------------------------------------------------------------------

    async def _read(self, request: Request, keep: bool = True) -> bytes:
        """The body, which a web page of another origin cannot send unasked: browsers ask before they send JSON."""
        limit, content = self.settings.body_bytes, bytearray()
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise ProtocolError(415, f"the body has the type {kind!r}; send Content-Type: application/json")
        size = 0
        try:
            async with asyncio.timeout(self.settings.seconds):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > limit:
                        raise ProtocolError(413, f"the body has more than {limit:,} bytes; make the pictures smaller")
                    if keep:
                        content += chunk
        except TimeoutError as error:
            raise ProtocolError(408, "the body did not come in time") from error
        return bytes(content)

    def _request(self, content: bytes) -> ChatRequest:
        return read_request(read_body(content), self.settings.name)

    def _question(self, asked: ChatRequest, deadline: float) -> Question:
        """In a thread: pictures are decoded, and the prompt is tokenised."""
        model, most = self.engine.model, self.engine.max_images
        try:
            model.check_sees(asked.urls, "")
            if len(asked.urls) > most and not model.config.data.blind:
                raise DataError(f"{len(asked.urls)} pictures; at most {most} are taken (--max_images)")
            images = read_pictures(model, asked.urls, self.settings.pictures)
            slots = sum(len(image.views) for image in images)
            if slots > most and not model.config.data.blind:
                raise DataError(
                    f"{len(images)} picture(s) of {slots} views; at most {most} views are taken (--max_images, and "
                    "what model.max_length has room for)"
                )
            request = model.request(asked.turns, images, 1, system=asked.system)
        except DataError as error:
            code = "context_length_exceeded" if isinstance(error, TooLongError) else None
            raise bad(said_of(error), "messages", code) from error
        room = model.model_config.max_length - request.encoded.length
        limit = int(min(asked.max_tokens or self.settings.max_new_tokens, room))
        return Question(request, limit, asked.sampling, asked.seed, asked.stop, deadline, asked.ignore_eos)

    def _submit(self, question: Question) -> _Heard:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def listen(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            ticket = self.engine.submit(question, listen)
        except UnavailableError as error:
            raise _failure(error) from error
        return _Heard(events, lambda: self.engine.cancel(ticket), question.request.encoded.length)

    async def _whole(self, request: Request, heard: _Heard, start: float) -> Response:
        answer, words, event = Answer(self.settings.name), [], None
        while not isinstance(event, Ended):
            event = await _unless_left(request, heard.events.get())
            if isinstance(event, Failed):
                raise _failure(event.error)
            if not words:
                self.metrics.first_token.observe(time.monotonic() - start)
            words.append(event.text if isinstance(event, Said) else "")
        self.metrics.whole.observe(time.monotonic() - start)
        return JSONResponse(answer.whole("".join(words), event.reason, _usage(heard, event)))

    async def _stream(self, heard: _Heard, event: Event, start: float, tell_usage: bool) -> AsyncIterator[str]:
        answer = Answer(self.settings.name)
        self.metrics.first_token.observe(time.monotonic() - start)
        yield server_sent(answer.piece({"role": "assistant", "content": ""}))
        while isinstance(event, Said):
            yield server_sent(answer.piece({"content": event.text}))
            event = await heard.events.get()
        if isinstance(event, Failed):
            yield server_sent(_failure(event.error).body)
            return
        yield server_sent(answer.piece({}, event.reason))
        if tell_usage:
            yield server_sent(answer.last(_usage(heard, event)))
        yield server_sent("[DONE]")
        self.metrics.whole.observe(time.monotonic() - start)

    # --- around the routes --------------------------------------------------------------------------------------------

    def _guarded(self, handle: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """With the key checked, and errors in the protocol's form."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_key(request)
                response = await handle(request)
            except ProtocolError as error:
                response = JSONResponse(error.body, error.status, error.headers)
            except ClientDisconnect:
                response = Response(status_code=LEFT)
            except Exception as error:
                logging.exception("%s failed", request.url.path)
                response = JSONResponse(_failure(error).body, 500)
            self.metrics.requests.labels(response.status_code).inc()
            return response

        return guarded

    def _check_key(self, request: Request) -> None:
        key = self.settings.api_key
        sent = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if key and not hmac.compare_digest(sent.encode(), key.encode()):
            hint = {"WWW-Authenticate": "Bearer"}
            raise ProtocolError(401, "no API key, or a wrong one: Authorization: Bearer KEY", None, "invalid_api_key",
                                INVALID, hint)  # fmt: skip

    def _close(self) -> None:
        self.open -= 1

    def _card(self) -> dict[str, Any]:
        return model_card(self.settings.name, self._created, self.engine.model.model_config.max_length)

    async def _in_thread(self, act: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, act, *args)


class _Stream(StreamingResponse):
    """Server-sent events, with what is to be closed when they end or the client leaves, even before the first one."""

    def __init__(self, events: AsyncIterator[str], closing: contextlib.ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._closing = closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._closing:
            await super().__call__(scope, receive, send)


async def _unless_left(request: Request, wanted: Any) -> Any:
    """The result, or ClientDisconnect as soon as the client has closed the connection."""
    left, got = asyncio.ensure_future(_left(request)), asyncio.ensure_future(wanted)
    try:
        await asyncio.wait({left, got}, return_when=asyncio.FIRST_COMPLETED)
        if got.done():
            return got.result()
        raise ClientDisconnect
    finally:
        left.cancel()
        got.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _usage(heard: _Heard, ended: Ended) -> Usage:
    return Usage(heard.prompt, ended.tokens, ended.cached)


def _failure(error: Exception) -> ProtocolError:
    """An error of the server in the protocol's form."""
    if isinstance(error, OverdueError):
        return ProtocolError(504, str(error), code="timeout", kind="timeout_error")
    if isinstance(error, UnavailableError):
        return ProtocolError(503, str(error), code="unavailable", kind="server_error", headers={"Retry-After": "5"})
    return ProtocolError(500, "the server failed; its log says why", code="internal_error", kind="server_error")


async def _no_such_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    said = f"{request.method} {request.url.path} is not served"
    return JSONResponse(ProtocolError(status, said).body, status)
