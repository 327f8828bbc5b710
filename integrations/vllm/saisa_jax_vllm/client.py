"""vLLM over HTTP: the few of its routes that the front asks."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

COMPLETIONS = "/v1/completions"


class VllmError(Exception):
    """vLLM has answered with an error; `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"vLLM says {status}: {message}")
        self.status = status


class UnreachableError(Exception):
    """vLLM does not answer."""


class Client:
    """vLLM at a URL, as `http://127.0.0.1:8001`; `$VLLM_API_KEY` is sent, as vLLM reads it."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._parts = urllib.parse.urlsplit(self.url)
        if self._parts.scheme not in ("http", "https") or not self._parts.hostname:
            raise ValueError(f"--vllm={url} is not like http://127.0.0.1:8001")

    def get(self, path: str, seconds: float = 10.0) -> Any:
        """What a route says, in JSON; None: nothing.

        Raises:
          UnreachableError, VllmError: no answer, or an error.
        """
        with self.asked("GET", path, None, seconds) as response:
            content = response.read()
            return json.loads(content) if content else None

    def complete(self, body: dict[str, Any], seconds: float = 600.0) -> Any:
        """A completion, whole. Errors as of `get`."""
        with self.asked("POST", COMPLETIONS, body, seconds) as response:
            return json.loads(response.read())

    @contextlib.contextmanager
    def asked(
        self,
        method: str,
        path: str,
        body: Any,
        seconds: float,
        opened: Callable[[socket.socket], None] = lambda socket: None,
    ) -> Iterator[http.client.HTTPResponse]:
        """A response whose body is to be read; `opened` gets the connection before anything is asked."""
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=max(seconds, 0.001))
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        try:
            connection.connect()
            opened(connection.sock)
            connection.request(method, self._parts.path + path, body and json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise VllmError(response.status, _said(response.read()))
            yield response
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UnreachableError(f"vLLM at {self.url} does not answer: {error or type(error).__name__}") from error
        finally:
            connection.close()


class Stream:
    """The tokens of one completion while they come; `close`, from any thread, ends it, and vLLM's work for it.

    Args:
      client: whom to ask.
      body: of the request.
      deadline: of `time.monotonic`.
    """

    def __init__(self, client: Client, body: dict[str, Any], deadline: float) -> None:
        self._client, self._deadline = client, deadline
        self._body = body | {"stream": True, "return_token_ids": True}
        self._socket: socket.socket | None = None
        self._closed = False
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def _opened(self, connection: socket.socket) -> None:
        with self._lock:
            if self._closed:
                raise ConnectionAbortedError
            self._socket = connection

    def __iter__(self) -> Iterator[int]:
        """Tokens, the one that ends the answer included; none after `close`.

        Raises:
          UnreachableError, VllmError: no answer, or an error.
          TimeoutError: the deadline is over.
        """
        try:
            with self._client.asked("POST", COMPLETIONS, self._body, self._left, self._opened) as response:
                yield from self._tokens(response)
        except UnreachableError:
            if not self._closed:
                raise

    @property
    def _left(self) -> float:
        return min(self._deadline - time.monotonic(), 1e6)

    def _tokens(self, response: http.client.HTTPResponse) -> Iterator[int]:
        while line := response.readline():
            if self._left <= 0:
                raise TimeoutError
            assert self._socket is not None
            self._socket.settimeout(self._left)
            said = line.removeprefix(b"data:").strip()
            if said == b"[DONE]":
                return
            if not line.startswith(b"data:"):
                continue
            piece = json.loads(said)
            if "error" in piece:
                raise VllmError(int(piece["error"].get("code") or 500), str(piece["error"].get("message")))
            for choice in piece.get("choices", ()):
                yield from choice.get("token_ids") or ()
        raise UnreachableError(f"vLLM at {self._client.url} has broken off an answer")


def _said(content: bytes) -> str:
    try:
        body = json.loads(content)
        return str(body.get("error", body).get("message"))
    except (ValueError, AttributeError):
        return content[:200].decode(errors="replace")
