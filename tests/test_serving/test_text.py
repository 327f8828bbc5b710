"""Text as it comes is the text of all tokens, cut before a stop string, and never shows half a character."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from saisa_jax.serving.text import BROKEN, TextStream
from saisa_jax.testing.tokenizers import byte_level, sentence_piece

WORDS = "  the  circle is blåu 图片 🙂🙂.\n\nis it\n red?  \n"


def pieces(tokenizer: Any, tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream, out = TextStream(tokenizer, stop), []
    for token in tokens:
        out.append(stream.push(token))
        if stream.stopped:
            break
    return [*out, stream.finish()], stream.stopped


@pytest.fixture(scope="module", params=[byte_level, sentence_piece], ids=lambda kind: kind.__name__)
def tokenizer(request) -> Any:
    return request.param()


def test_pieces_join_to_the_text_of_all_tokens(tokenizer):
    rng = np.random.default_rng(0)
    cases = [tokenizer.encode(WORDS, add_special_tokens=False), []]
    cases += [rng.integers(0, len(tokenizer), 40).tolist() for _ in range(200)]  # broken characters and control tokens
    for tokens in cases:
        told, stopped = pieces(tokenizer, tokens)
        assert "".join(told) == tokenizer.decode(tokens, skip_special_tokens=True).strip() and not stopped


def test_no_half_characters_and_no_late_pieces():
    tokenizer = byte_level()
    tokens = tokenizer.encode(WORDS, add_special_tokens=False)
    told, _ = pieces(tokenizer, tokens)
    assert any(BROKEN in tokenizer.decode(token) for token in tokens) and not any(BROKEN in piece for piece in told)
    assert sum(map(bool, told)) > 15  # in many pieces, not at the end


@pytest.mark.parametrize(
    "stop, expected",
    [
        ("\n\n", "the  circle is blåu 图片 🙂🙂."),
        ("片", "the  circle is blåu 图"),
        ("🙂🙂", "the  circle is blåu 图片"),
        ("blåx", None),
        ("is it\n red", "the  circle is blåu 图片 🙂🙂."),
        ("the", ""),
    ],
)
def test_stop_strings(stop, expected):
    tokenizer = byte_level()
    told, stopped = pieces(tokenizer, tokenizer.encode(WORDS, add_special_tokens=False), ("never", stop))
    assert "".join(told) == (WORDS.strip() if expected is None else expected)
    assert stopped == (expected is not None)
