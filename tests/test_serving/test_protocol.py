"""What a request's body says."""

from __future__ import annotations

from typing import Any

import pytest

from saisa_jax.data.sample import ASSISTANT, USER, Turn
from saisa_jax.inference.generate import Sampling
from saisa_jax.serving.protocol import ProtocolError, read_body, read_request


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "high"}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


HI = [user(text("hi"))]


def read(messages: Any = HI, **fields: Any) -> Any:
    return read_request({"messages": messages, **fields}, "tiny")


def test_places_of_pictures_are_kept():
    asked = read(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": [text("Be kind.")]},
            user(text("is"), image("data:a"), text("like"), {"type": "image_url", "image_url": "data:b"}, text("?")),
            {"role": "assistant", "content": "no"},
            {"role": "user", "content": "say <image>"},
        ]
    )
    assert asked.turns == (
        Turn(USER, "is\n<image>\nlike\n<image>\n?"),
        Turn(ASSISTANT, "no"),
        Turn(USER, "say < image >"),  # a word, and no picture
    )
    assert asked.urls == ("data:a", "data:b") and asked.system == "Be brief.\nBe kind."


def test_fields():
    asked = read(
        model="tiny", max_tokens=5, temperature=0.5, top_p=0.9, seed=7, stop="\n", stream=True, n=1,
        stream_options={"include_usage": True}, user="me", response_format={"type": "text"}, frequency_penalty=0.0,
    )  # fmt: skip
    assert (asked.max_tokens, asked.sampling, asked.seed, asked.stop) == (5, Sampling(0.5, 0.9), 7, ("\n",))
    assert asked.stream and asked.include_usage
    assert read(ignore_eos=True).ignore_eos and not asked.ignore_eos
    assert read(max_tokens=5, max_completion_tokens=9).max_tokens == 9
    plain = read(max_tokens=None, temperature=None, stop=None, stream=None, seed=None)
    assert plain.max_tokens is None and plain.sampling == Sampling(1.0, 1.0) and not plain.stream
    assert read().seed != read().seed and read(seed=-1).seed == 2**32 - 1


@pytest.mark.parametrize(
    "fields, status, param, said",
    [
        ({"model": "gpt-4"}, 404, "model", "'gpt-4' is not served here; 'tiny' is"),
        ({"n": 2}, 400, "n", "one answer"),
        ({"logprobs": True}, 400, "logprobs", "not served"),
        ({"max_tokens": 0}, 400, "max_tokens", "of at least 1"),
        ({"max_completion_tokens": 1.5}, 400, "max_completion_tokens", "an integer"),
        ({"temperature": -1}, 400, "temperature", "of at least 0"),
        ({"temperature": float("nan")}, 400, "temperature", "a number"),
        ({"top_p": 0}, 400, "top_p", "above 0, at most 1"),
        ({"seed": True}, 400, "seed", "an integer"),
        ({"stop": [1]}, 400, "stop", "list of strings"),
        ({"stop": ["x"] * 17}, 400, "stop", "at most 16"),
        ({"stream_options": "yes"}, 400, "stream_options", "an object"),
        ({"messages": None}, 400, "messages", "at least one message"),
        ({"messages": ["hi"]}, 400, "messages[0]", "an object"),
        ({"messages": [{"role": "usr", "content": "x"}]}, 400, "messages[0].role", "did you mean user"),
        ({"messages": [*HI, {"role": "system", "content": "x"}]}, 400, "messages[1].role", "after the first turn"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content", "not a number"),
        ({"messages": [user({"type": "audio"})]}, 400, "messages[0].content[0]", "'audio'"),
        ({"messages": [user({"type": "image_url"})]}, 400, "messages[0].content[0]", "not null"),
        ({"messages": [user(text("\ud800"))]}, 400, "messages[0].content", "no text"),
        ({"messages": [*HI, {"role": "assistant", "content": [image("data:a")]}]}, 400, "messages[1]", "a picture in"),
        ({"messages": [*HI, {"role": "assistant", "content": "x"}]}, 400, "messages", "is the user's"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "messages", "is the user's"),
        ({"messages": [user(*[image("data:a")] * 65)]}, 400, "messages", "at most 64"),
    ],
)
def test_what_is_refused(fields, status, param, said):
    with pytest.raises(ProtocolError) as caught:
        read(**fields)
    error = caught.value
    assert (error.status, error.param) == (status, param) and said in error.message
    assert set(error.body["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("content", [b"", b"{", b'{"messages": [', b"\xff", b"[" * 100_000, b"3"])
def test_bodies_that_are_none(content):
    with pytest.raises(ProtocolError, match="the body is"):
        read_body(content)
