"""Generated tokens as text while they come: whole characters alone, up to the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"  # what a tokenizer writes for the bytes of a character that is not whole


class TextStream:
    """The text of an answer, piece by piece; the pieces joined are `VisionLanguageModel.text` of its tokens.

    Only the last tokens are decoded again for each new one. What may yet become a stop string, and white space that may
    be the answer's last, is held back.

    Args:
      tokenizer: of the model.
      stop: the answer ends before the first of these.

    Attributes:
      stopped: whether one of them was met.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []  # the last ones: those of `_shown`, and what came after
        self._shown = 0  # of these tokens, how many are in `_held` or were given out
        self._held = ""
        self._begun = False

    def push(self, token: int) -> str:
        """What one more token adds; "" if nothing is certain yet."""
        self._tokens.append(token)
        return self._take(ended=False)

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        return "" if self.stopped else self._take(ended=True)

    def _take(self, ended: bool) -> str:
        self._held += self._decoded(ended)
        if not self._begun:
            self._held = self._held.lstrip()
            self._begun = bool(self._held)
        found = min((at for at in map(self._held.find, self._stop) if at >= 0), default=-1)
        self.stopped = found >= 0
        certain = found if self.stopped else len(self._held) - (0 if ended else self._possible_stop())
        text = self._held[:certain].rstrip()
        self._held = self._held[len(text) :]
        return text

    def _decoded(self, ended: bool) -> str:
        """Text of the tokens that were not decoded yet, in the light of those before them."""
        before = self._decode(self._tokens[: self._shown])
        now = self._decode(self._tokens)
        if now.endswith(BROKEN) and not ended:
            return ""
        if len(now) > len(before):  # else these tokens have no text, and the ones before remain the context
            self._tokens, self._shown = self._tokens[self._shown :], len(self._tokens) - self._shown
        else:
            self._shown = len(self._tokens)
        return now[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _possible_stop(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max(map(len, self._stop), default=0)
        ends = range(min(longest - 1, len(self._held)), 0, -1)
        return next((n for n in ends if any(stop.startswith(self._held[-n:]) for stop in self._stop)), 0)
