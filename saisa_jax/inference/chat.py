"""A conversation with a model: earlier turns are not processed again.

`Chat` keeps the keys and values of the conversation so far. A new turn is tokenised with all that came before; the
longest prefix that the cache already holds, tokens, positions and images alike, is kept, and the rest is processed
after it. So an edited, a cut or an interrupted conversation needs no special case.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from saisa_jax.data.sample import ASSISTANT, USER, Turn
from saisa_jax.data.text.conversation import IMAGE, without_placeholders
from saisa_jax.inference.generate import GREEDY, Sampling, bucket, check_sampling
from saisa_jax.inference.image_cache import EncodedImage
from saisa_jax.inference.model import Request, VisionLanguageModel
from saisa_jax.models.kv_cache import KVCache

MAX_NEW_TOKENS = 256  # of an answer, unless asked for otherwise


@dataclass
class _Read:
    """What the cache holds: text tokens with their positions, and images with theirs."""

    cache: KVCache
    tokens: list[int]
    positions: list[int]
    images: list[tuple[str, int]]  # (key, position of the first visual token)
    offset: int  # columns before the first text token (LLaVA's visual tokens)


@dataclass
class Chat:
    """One conversation.

        chat = model.chat()
        chat.add_image("table.jpg")
        for words in chat.ask("What is on the table?"):
            print(words, end="", flush=True)

    Attributes:
      turns: of user and assistant, `<image>` where an image stands.
      images: of all turns, in their order, each with all its views.
      reused: text tokens of the last prompt that were in the cache.
      generated: tokens of the last answer.
    """

    model: VisionLanguageModel
    turns: list[Turn] = field(default_factory=list)
    images: list[EncodedImage] = field(default_factory=list)
    reused: int = 0
    generated: int = 0
    _pending: list[EncodedImage] = field(default_factory=list)  # for the next question
    _read: _Read | None = None

    def __post_init__(self) -> None:
        _ = self.model.generator  # raises now if the model has no tokenizer
        self.model.check_alone("a conversation")
        if self.model.row_ways != 1:
            raise ValueError("a conversation is one row: load the model on a mesh with data=1 and fsdp=1, or without")

    def add_image(self, image: Any) -> None:
        """Puts an image before the next question.

        Raises:
          DataError: it cannot be read.
        """
        self._pending += self.model.encode_images([image])

    def ask(
        self, question: str, max_new_tokens: int | None = None, sampling: Sampling = GREEDY, seed: int = 0
    ) -> Generator[str, None, None]:
        """The answer, in pieces of text as they come. If the caller stops early, the answer so far is kept.

        Args:
          question: may say `<image>` where the images added since the last one stand; else they stand before it.
          max_new_tokens: the most tokens of the answer; None: as many as `model.max_length` leaves, at most 256.
          sampling: greedy by default.
          seed: of the sampling.

        Raises:
          DataError: an empty question, or a conversation that is too long; nothing is changed then.
        """
        check_sampling(sampling)
        question = question.strip()
        if IMAGE not in question:
            question = f"{IMAGE}\n" * len(self._pending) + question
        turns = [*self.turns, Turn(USER, question)]
        images = [*self.images, *self._pending]
        request = self.model.request(turns, images, max_new_tokens or 1)
        if max_new_tokens is None:
            max_new_tokens = min(MAX_NEW_TOKENS, self.model.model_config.max_length - request.encoded.length)
        return self._answer(turns, images, request, max_new_tokens, sampling, seed)

    def _answer(
        self,
        turns: list[Turn],
        images: list[EncodedImage],
        request: Request,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
    ) -> Generator[str, None, None]:
        tokens: list[int] = []
        shown = ""
        try:
            for token in self._tokens(request, max_new_tokens, sampling, seed):
                tokens.append(token)
                text = self.model.text(tokens)
                if text != shown and not text.endswith("\ufffd"):  # a character of several tokens, not whole yet
                    yield text[len(shown) :]
                    shown = text
            text = self.model.text(tokens)
            if text != shown:
                yield text[len(shown) :]
        finally:
            answer = self.model.text(tokens)
            if answer:
                said = Turn(ASSISTANT, without_placeholders(answer))  # a model may generate the word
                self.turns, self.images, self._pending = [*turns, said], images, []
            self.generated = len(tokens)

    def _tokens(self, request: Request, max_new_tokens: int, sampling: Sampling, seed: int) -> Iterator[int]:
        """New tokens, one by one; `_read` says at any time what the cache holds."""
        model, generator = self.model, self.model.generator
        with model.on_mesh():
            token, read = self._read_prompt(request, max_new_tokens, sampling, seed)
        position = request.encoded.length
        for n in range(1, max_new_tokens + 1):
            number = int(np.asarray(token)[0])  # not an operation on the device
            if number in generator.eos_ids:
                return
            yield number
            if n == max_new_tokens:
                return
            self._read = None  # an interrupt in the next lines must not leave a donated cache
            with model.on_mesh():
                now = np.asarray([position], np.int32)
                token, read.cache = generator.step(model.params, token, now, read.cache, n, sampling, seed)
            read.tokens.append(number)
            read.positions.append(position)
            self._read = read
            position += 1

    # --- reading ------------------------------------------------------------------------------------------------------

    def _read_prompt(
        self, request: Request, max_new_tokens: int, sampling: Sampling, seed: int
    ) -> tuple[jax.Array, _Read]:
        """The first token after the prompt; the part of it that the cache holds is kept."""
        encoded = request.encoded
        tokens, positions = encoded.tokens.tolist(), encoded.positions.tolist()
        images = self._places(request)
        old, self._read = self._read, None  # an error in between leaves no half-read cache
        kept = 0 if old is None else self._kept(old, tokens, positions, images)
        self.reused = kept
        if old is None or kept == 0:
            token, read = self._start(request, max_new_tokens, sampling, seed)
        else:
            token, read = self._extend(old, request, kept, max_new_tokens, sampling, seed)
        read.tokens, read.positions, read.images = tokens, positions, images
        self._read = read
        return token, read

    def _places(self, request: Request) -> list[tuple[str, int]]:
        positions = request.encoded.image_positions.tolist()
        return [(image.key, position) for image, position in zip(request.images, positions, strict=True)]

    def _kept(self, old: _Read, tokens: list[int], positions: list[int], images: list[tuple[str, int]]) -> int:
        """How many text tokens of the prompt the cache holds, the images before them being the same."""
        same = _common(old.images, images)
        changed = [place for _, place in (*old.images[same:], *images[same:])]
        limit = min(changed, default=1 << 30)
        kept = _common(list(zip(old.tokens, old.positions, strict=True)), list(zip(tokens, positions, strict=True)))
        kept = sum(position < limit for position in positions[:kept])
        if self.model.model_config.frozen_prefix:
            # Text has attended to nothing if an image came after it; it is read anew where that changes.
            first = min((place for _, place in (*old.images[:1], *images[:1])), default=-1)
            if old.images[:1] != images[:1] or kept < sum(position < first for position in positions):
                return 0
        if not self.model.generator.caches_images:
            # LLaVA's visual tokens are in the cache themselves, and have attended to what precedes them.
            last = max((place for _, place in (*old.images, *images)), default=-1)
            if changed or kept < sum(position < last for position in positions):
                return 0
        return min(kept, len(tokens) - 1)  # the logits are those after the last token: at least one is processed

    def _start(self, request: Request, max_new_tokens: int, sampling: Sampling, seed: int) -> tuple[jax.Array, _Read]:
        model = self.model
        batch = model.batch([request])
        padded = batch["tokens"].shape[1]  # the bucket of the prompt's length
        extra = bucket(len(request.encoded.tokens) + max_new_tokens) - padded
        images = model.image_slots(batch, [request])
        token, cache = model.generator.start(model.params, batch, extra, images, sampling, seed)
        return token, _Read(cache, [], [], [], offset=cache.k.shape[3] - padded - extra)

    def _extend(
        self, old: _Read, request: Request, kept: int, max_new_tokens: int, sampling: Sampling, seed: int
    ) -> tuple[jax.Array, _Read]:
        model, encoded = self.model, request.encoded
        new = len(encoded.tokens) - kept
        length = bucket(new)
        cache = old.cache
        # All of the padded piece is written, and every new token after it.
        needed = old.offset + kept + max(length, new + max_new_tokens)
        room = cache.k.shape[3]
        if needed > room:
            room = bucket(needed)
        batch = model.batch([request])
        if model.generator.caches_images and old.images != self._places(request):
            images = model.image_slots(batch, [request])
            visual = None if images is None else model.generator.place(model.params, batch, images)
            cache = cache._replace(visual=visual)
        pad = lambda values: np.pad(np.asarray(values[kept:], np.int32), (0, length - new))[None]  # noqa: E731
        token, cache = model.generator.extend(
            model.params,
            pad(encoded.tokens),
            pad(encoded.positions),
            pad(np.ones(len(encoded.tokens), np.int32)),
            cache,
            old.offset + kept,
            room,
            sampling,
            seed,
        )
        return token, _Read(cache, [], [], [], old.offset)


def _common(one: Sequence[object], other: Sequence[object]) -> int:
    """The length of the longest common prefix."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
