"""Plain text to tokens, a piece at a time: no control tokens found in it, none added, nothing cut."""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from saisa_jax.data.sample import DataError
from saisa_jax.data.text.frames import Frame, own_frame, written_frame
from saisa_jax.data.text.templates import Template

START, TEXT, CONTROL, PICTURE = "start", "text", "control", "picture"  # what a piece of text comes after


class TextEncoder:
    """A tokenizer's encoding of plain text.

    It works on a copy of the tokenizer's backend. The transformers wrapper sets options on the shared one at each call,
    which fails while another thread encodes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()
        self.bos, self.eos = (
            None if token is None else self.backend.token_to_id(str(token))
            for token in (tokenizer.bos_token, tokenizer.eos_token)
        )
        self.special = [str(token) for token in tokenizer.all_special_tokens]
        # SentencePiece: "a" alone is the piece "▁a".
        self.adds_space = self.backend.encode("a", add_special_tokens=False).tokens[0].startswith("▁")
        self.joined = _without_own_space(self.backend) if self.adds_space else self.backend
        self.space_after_control = tokenizer.init_kwargs.get("legacy") is not False
        # As in `tokenizer(text)`, which chat templates are written for: of the tokens of "</s>a" the second.
        start = tokenizer.backend_tokenizer.encode(f"{tokenizer.eos_token}a", add_special_tokens=False).tokens[1:2]
        self.whole_space_after_control = self.space_after_control and bool(start) and start[0].startswith("▁")
        self.ids = lru_cache(maxsize=4096)(self._ids)  # questions and templates come again and again
        self.end = lru_cache(maxsize=64)(self._end)
        self.frame = lru_cache(maxsize=256)(self._frame)

    def _ids(self, text: str, after: str = START, whole: bool = False) -> tuple[int, ...]:
        """The tokens of a piece of text after a piece of another kind.

        Args:
          text: the piece.
          after: START, TEXT, CONTROL or PICTURE.
          whole: tokens as of the whole text from one control token to the next; otherwise as LLaVA's pieces.
        """
        if whole:
            joined = after == TEXT or (after == CONTROL and not self.whole_space_after_control)
        else:
            joined = after == CONTROL and not self.space_after_control
            if self.adds_space and text.startswith(" ") and after != PICTURE and not joined:
                text = text[1:]
        backend = self.joined if joined else self.backend
        return tuple(backend.encode(text, add_special_tokens=False).ids)

    def _frame(self, template: Template, questions: int, with_system: bool) -> Frame:
        if template.own:
            return own_frame(self.tokenizer, questions, with_system)
        return written_frame(template, questions, with_system)

    def control(self, token: str, template: Template) -> int:
        number = self.backend.token_to_id(token)
        if number is None:
            raise DataError(
                f"template {template.name!r} needs the token {token!r}, which the tokenizer lacks; choose another "
                "template (pretrain.template, finetune.template) or another data.tokenizer"
            )
        return number

    def _end(self, template: Template) -> int:
        """The token that ends an answer, after a check that the template suits the tokenizer."""
        if template.own:
            return self.control(str(self.frame(template, 1, False).end), template)
        text = template.system_format + template.user + template.answer + template.after
        for token in template.controls:
            text = text.replace(token, "")
        clash = [token for token in self.special if token in text]
        if clash:
            raise DataError(
                f"template {template.name!r} writes {clash[0]!r} as text, but it is a control token of this tokenizer; "
                "choose another template (pretrain.template, finetune.template) or another data.tokenizer"
            )
        if template.end is not None:
            return self.control(template.end, template)
        if self.eos is None:
            raise DataError(f"template {template.name!r} ends with the tokenizer's EOS token, and it has none")
        return self.eos


def _without_own_space(backend: Tokenizer) -> Tokenizer:
    """SentencePiece without the space that it puts before a piece."""
    document = json.loads(backend.to_str())

    def strip(part: dict[str, Any] | None) -> dict[str, Any] | None:
        if part is None or part["type"] == "Prepend":
            return None
        for name in ("normalizers", "pretokenizers"):
            if name in part:
                part[name] = [kept for inner in part[name] if (kept := strip(inner)) is not None]
        return part | {"prepend_scheme": "never"} if part["type"] == "Metaspace" else part

    for name in ("normalizer", "pre_tokenizer"):
        document[name] = strip(document[name])
    made = Tokenizer.from_str(json.dumps(document))
    made.encode_special_tokens = True
    return made


def text_encoder(tokenizer: PreTrainedTokenizerFast) -> TextEncoder:
    return _cached_text_encoder(tokenizer, len(tokenizer), str(tokenizer.chat_template))


@lru_cache(maxsize=4)
def _cached_text_encoder(tokenizer: PreTrainedTokenizerFast, size: int, chat_template: str) -> TextEncoder:
    """One encoder for a tokenizer, made anew when tokens were added to it (`size`), or another chat template."""
    del size, chat_template
    return TextEncoder(tokenizer)
