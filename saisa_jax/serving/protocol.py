"""OpenAI's chat completions, as far as they are served: what a request's body says, and the bodies of answers."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from saisa_jax.data.sample import ASSISTANT, USER, DataError, Turn
from saisa_jax.data.text.conversation import IMAGE, without_placeholders
from saisa_jax.errors import did_you_mean
from saisa_jax.inference.generate import Sampling

SYSTEM_ROLES = ("system", "developer")
MOST_STOPS, MOST_PICTURES = 16, 64  # of any server: a limit on what a request makes us look for and fetch
INVALID = "invalid_request_error"


class ProtocolError(Exception):
    """An answer that is none.

    Args:
      status: of HTTP.
      message: what was seen, what was expected.
      param: the field of the request.
      code: OpenAI's word for it.
      kind: `type` of OpenAI's errors.
      headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        kind: str = INVALID,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.kind = status, message, param, code, kind
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def bad(message: str, param: str | None = None, code: str | None = None) -> ProtocolError:
    """An error of the request: 400."""
    return ProtocolError(400, message, param, code)


def said_of(error: DataError) -> str:
    """Why a picture or a conversation cannot be read, as a client reads it."""
    return f"{error.sample_id}: {error.reason}" if error.sample_id else error.reason


@dataclass(frozen=True)
class ChatRequest:
    """A request for an answer.

    Attributes:
      turns: of user and assistant; `<image>` where a picture stands.
      urls: of the pictures, in their order.
      system: a system prompt; None: the model's own.
      max_tokens: of the answer; None: as the server has it.
      sampling: how tokens are chosen.
      seed: of the sampling; of a request that has none, a random one.
      stop: the answer ends before the first of these.
      stream: whether it is sent in pieces.
      include_usage: whether a stream ends with the usage.
      ignore_eos: whether end tokens end nothing: not OpenAI's, but what programs that measure servers send.
    """

    turns: tuple[Turn, ...]
    urls: tuple[str, ...]
    system: str | None
    max_tokens: int | None
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    ignore_eos: bool


def read_body(content: bytes) -> dict[str, Any]:
    """A request's body, which is a JSON object.

    Raises:
      ProtocolError: it is none.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise bad(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise bad(f"the body is a JSON object, not {_kind(body)}")
    return body


def read_request(body: dict[str, Any], model: str) -> ChatRequest:
    """What is asked for; fields that are not known here change nothing.

    Args:
      body: of `read_body`.
      model: the one that is served; a request may leave it out.

    Raises:
      ProtocolError: another model, or a field that is not as it should be.
    """
    named = body.get("model", model)
    if named != model:
        raise unknown_model(named, model)
    if body.get("n") not in (None, 1):
        raise bad(f"n={body['n']!r}: one answer is given to a request; send it again for another one", "n")
    if body.get("logprobs"):
        raise bad("logprobs are not served", "logprobs")
    limit = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    max_tokens = _number(body, limit, 1, math.inf, integer=True)
    sampling = Sampling(
        float(_number(body, "temperature", 0, 100, 1.0)), float(_number(body, "top_p", 0, 1, 1.0, above=True))
    )
    seed = _number(body, "seed", -(2**63), 2**64, integer=True)
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise bad(f"stream_options is an object, not {_kind(options)}", "stream_options")
    turns, urls, system = read_messages(body.get("messages"))
    return ChatRequest(
        turns=turns,
        urls=urls,
        system=system,
        max_tokens=max_tokens,
        sampling=sampling,
        seed=secrets.randbits(32) if seed is None else seed % 2**32,
        stop=_stops(body.get("stop")),
        stream=bool(body.get("stream")),
        include_usage=bool(options.get("include_usage")),
        ignore_eos=bool(body.get("ignore_eos")),
    )


def read_messages(messages: Any) -> tuple[tuple[Turn, ...], tuple[str, ...], str | None]:
    """Turns, the pictures' URLs in their order, and a system prompt if there is one.

    The parts of a message stand on lines of their own, a picture where it stands among them.

    Raises:
      ProtocolError: no messages, an unknown role or part, a picture that is not the user's, or no user's turn at last.
    """
    if not isinstance(messages, list) or not messages:
        raise bad("messages is a list of at least one message", "messages")
    turns: list[Turn] = []
    urls: list[str] = []
    system: list[str] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise bad(f"{where} is an object with role and content, not {_kind(message)}", where)
        role = message.get("role")
        text, found = _content(message.get("content"), f"{where}.content")
        if found and role != USER:
            raise bad(f"{where} has a picture in a turn of {role!r}: pictures stand in the user's turns", where)
        if role in SYSTEM_ROLES and not turns:
            system.append(text)
        elif role in (USER, ASSISTANT):
            turns.append(Turn(role, text))
            urls += found
        else:
            known = (*SYSTEM_ROLES, USER, ASSISTANT)
            late = " after the first turn" if role in SYSTEM_ROLES else did_you_mean(str(role), known)
            raise bad(f"{where} has the role {role!r}{late}; served are {', '.join(known)}", f"{where}.role")
    if not turns or turns[-1].role != USER:
        raise bad("the last message is the user's: there is nothing to answer", "messages")
    if len(urls) > MOST_PICTURES:
        raise bad(f"{len(urls)} pictures; at most {MOST_PICTURES} are looked at", "messages")
    return tuple(turns), tuple(urls), "\n".join(system) if system else None


def unknown_model(named: Any, model: str) -> ProtocolError:
    """The error for another model than the one that is served."""
    message = f"the model {named!r} is not served here; {model!r} is"
    return ProtocolError(404, message, "model", "model_not_found")


def _content(content: Any, where: str) -> tuple[str, list[str]]:
    """A message's text, with `<image>` where its pictures stand, and their URLs."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise bad(f"{where} is a string or a list of parts, not {_kind(content)}", where)
    words: list[str] = []
    urls: list[str] = []
    for number, part in enumerate(content):
        here = f"{where}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            text = part.get("text")
            if not isinstance(text, str):
                raise bad(f"{here}.text is a string, not {_kind(text)}", here)
            words.append(without_placeholders(text))
        elif kind == "image_url":
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            if not isinstance(url, str):
                raise bad(f"{here}.image_url is {{'url': 'data:image/png;base64,...'}}, not {_kind(url)}", here)
            urls.append(url)
            words.append(IMAGE)
        else:
            raise bad(f"{here} has the type {kind!r}; text and image_url are served", here)
    text = "\n".join(words)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise bad(f"{where} is no text: {error.reason}", where) from error
    return text, urls


def _number(
    body: dict[str, Any], name: str, low: float, high: float, default: Any = None, *, integer: bool = False,
    above: bool = False,
) -> Any:  # fmt: skip
    """A field that is a number from low (`above`: above it) to high, or its default."""
    value = body.get(name)
    if value is None:
        return default
    good = isinstance(value, int if integer else int | float) and not isinstance(value, bool)
    if not good or not low <= value <= high or (above and value == low):
        kind = "an integer" if integer else "a number"
        bounds = f"{'above' if above else 'of at least'} {low:g}" + (f", at most {high:g}" if high < 2**60 else "")
        raise bad(f"{name}={value!r} is not {kind} {bounds}", name)
    return value


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise bad("stop is a string or a list of strings", "stop")
    if len(stops) > MOST_STOPS:
        raise bad(f"stop has {len(stops)} strings; at most {MOST_STOPS} are looked for", "stop")
    return tuple(each for each in stops if each)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


# --- answers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """What an answer took: positions of the prompt, its visual tokens included, of which `cached` were kept ones."""

    prompt: int
    completion: int
    cached: int

    @property
    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Answer:
    """The bodies of one answer, whole or in pieces."""

    def __init__(self, model: str, clock: Callable[[], float] = time.time) -> None:
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(clock()), "model": model}

    def whole(self, text: str, reason: str, usage: Usage) -> dict[str, Any]:
        message = {"role": ASSISTANT, "content": text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage.body}

    def piece(self, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return self._chunk([choice])

    def last(self, usage: Usage) -> dict[str, Any]:
        """A piece without text, of a stream that is to tell its usage."""
        return {**self._chunk([]), "usage": usage.body}

    def _chunk(self, choices: Sequence[Any]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": list(choices)}


def model_card(name: str, created: int, max_length: int) -> dict[str, Any]:
    """A model as /v1/models tells of it."""
    return {
        "id": name, "object": "model", "created": created, "owned_by": "saisa_jax", "max_model_len": max_length,
    }  # fmt: skip


def server_sent(body: dict[str, Any] | str) -> str:
    """A server-sent event."""
    return f"data: {body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)}\n\n"
