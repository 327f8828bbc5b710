"""Conversations as tokens, with labels and the positions of text and images.

How text becomes tokens. A conversation is written as a stream of pieces: text, control tokens (`</s>`,
`<|im_start|>`, ...) and images. Each piece of text is tokenised by itself, exactly once:

- The template's words and a user's words that touch are one piece. A control token, an image or the change from prompt
  to answer ends a piece. So the labels are known from the pieces: an answer and its end token are supervised, nothing
  else is, and no prefix is ever tokenised a second time to find where an answer begins.
- Text is never searched for control tokens: a user who types `</s>` gets its characters, not the end of the turn.
- One BOS stands at the front where the template wants it and the tokenizer has one.
- A byte-level BPE (Llama 3, Qwen, SmolLM) gets the space between `ASSISTANT:` and the answer as part of the answer, so
  that its first token is the one that stands in running text. A SentencePiece tokenizer (Llama 2, Mistral) puts its own
  space before every piece, so that the written one is left out. Both then equal the tokens of the whole text. After an
  image SentencePiece puts its space whatever the piece starts with, a newline or a written space: so did the code that
  LLaVA's and SAISA's published weights were trained with. After a control token it puts none where the tokenizer says
  `legacy=False`, as Vicuna 1.5's does: the second `USER` of a conversation is another token than the first.
- Words of either side lose white space at their ends.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float32, Int32
from transformers import PreTrainedTokenizerFast

from saisa_jax.data.sample import ASSISTANT, USER, DataError, EmptyAnswerError, TooLongError, Turn
from saisa_jax.data.text.frames import SYSTEM, default_system
from saisa_jax.data.text.templates import OWN, TEMPLATES, Template, find_template
from saisa_jax.data.text.text_encoder import CONTROL, PICTURE, START, TEXT, TextEncoder, text_encoder

IMAGE = "<image>"


@dataclass(frozen=True)
class Encoded:
    """One conversation, not padded: t text tokens and m image slots.

    `targets[i]` is the text token after `tokens[i]`, predicted with weight `loss_weights[i]` (0 or 1); the last one has
    none (0, weight 0). Positions count every view of an image as the `num_patches` visual tokens that it becomes.
    """

    sample_id: str
    tokens: Int32[np.ndarray, " t"]
    targets: Int32[np.ndarray, " t"]
    loss_weights: Float32[np.ndarray, " t"]
    positions: Int32[np.ndarray, " t"]
    image_positions: Int32[np.ndarray, " m"]  # of a view's first visual token
    length: int  # expanded: text and visual tokens
    views: tuple[int, ...]  # of each image; m together


def encode(
    turns: Sequence[Turn],
    template: Template | str,
    tokenizer: PreTrainedTokenizerFast,
    num_patches: int,
    *,
    system_prompt: str | None = None,
    num_images: int | None = None,
    views: Sequence[int] | None = None,
    sample_id: str = "",
) -> Encoded:
    """A conversation as tokens with labels.

    Images stand where the turns say `<image>`. If no turn says so, `num_images` of them stand at the start of the first
    user turn, as in LLaVA: "<image>\\n" each, then the text. A turn's only image, at its start or end, stands at its
    front with a line break after it, as LLaVA puts it; several, and one within the text, stay where they are.

    Args:
      turns: user and assistant in turn, the user first.
      template: one of `templates.TEMPLATES`, or its name; "tokenizer": the tokenizer's own chat template.
      tokenizer: a fast tokenizer.
      num_patches: P, visual tokens of an image slot.
      system_prompt: instead of the template's own; "" for none (a chat template may then write one of its own).
      num_images: images of the sample; None: as many as there are placeholders.
      views: how many image slots each of these takes, one after the other (`data/views.py`); None: one.
      sample_id: for errors.

    Raises:
      DataError: unknown role, two turns of one role in a row, an empty answer, `<image>` in an answer, another number
        of placeholders than of images, nothing supervised, or a template whose tokens the tokenizer lacks.
    """
    template = find_template(template)
    turns = _checked_turns(turns, num_images, sample_id)
    stream = _write(turns, template, tokenizer, num_patches, views, system_prompt, sample_id)
    encoded = stream.encoded(sample_id)
    if not encoded.loss_weights.any():
        raise DataError(
            f"no token is supervised: {len(turns)} turn(s) without an answer to learn from "
            f"(template {template.name!r})",
            sample_id,
        )
    return encoded


def encode_prompt(
    turns: Sequence[Turn],
    template: Template | str,
    tokenizer: PreTrainedTokenizerFast,
    num_patches: int,
    *,
    system_prompt: str | None = None,
    num_images: int | None = None,
    views: Sequence[int] | None = None,
    sample_id: str = "",
) -> Encoded:
    """A conversation that ends with a user turn, as the tokens after which the assistant is to speak.

    Args and errors as `encode`; no token is supervised.

    Raises:
      DataError: also if the last turn is not the user's, or if the prompt ends in an image.
    """
    template = find_template(template)
    turns = _checked_turns(turns, num_images, sample_id)
    if turns[-1].role != USER:
        raise DataError("a prompt ends with a user turn, this one with the assistant's", sample_id)
    stream = _write(turns, template, tokenizer, num_patches, views, system_prompt, sample_id)
    encoded = stream.encoded(sample_id)
    return replace(encoded, targets=np.zeros_like(encoded.targets), loss_weights=np.zeros_like(encoded.loss_weights))


def end_token_id(template: Template | str, tokenizer: PreTrainedTokenizerFast) -> int:
    """The token that ends an answer, at which generation stops."""
    return text_encoder(tokenizer).end(find_template(template))


def fitting_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """The name of the template that writes what the tokenizer's own chat template writes.

    One of ours, if a conversation of two rounds without a system prompt comes out the same to the token (what the chat
    template says by itself is given to ours as `default_system`); else "tokenizer", the chat template itself.

    Raises:
      DataError: the tokenizer has no chat template, or one that cannot be used (`frames.own_frame`).
    """
    turns = [Turn(role, text) for text in ("Is it?", "What is it?") for role in (USER, ASSISTANT)]
    theirs = encode(turns, OWN, tokenizer, 0).tokens.tolist()
    for name, template in TEMPLATES.items():
        with contextlib.suppress(DataError):
            system = default_system(tokenizer, template)
            if encode(turns, template, tokenizer, 0, system_prompt=system).tokens.tolist() == theirs:
                return name
    return OWN.name


def told_views(encoded: Encoded) -> str:
    """For messages, after the number of images: how many views they have, if these are more; else nothing."""
    slots = len(encoded.image_positions)
    return f" of {slots} views" if slots > len(encoded.views) else ""


def check_length(encoded: Encoded, text_length: int, max_length: int | None = None) -> None:
    """Raises TooLongError if a conversation does not fit a row of `text_length` tokens, or `max_length` expanded."""
    tokens = len(encoded.tokens)
    if tokens > text_length:
        raise TooLongError(
            f"{tokens} text tokens do not fit a row of {text_length}; raise the stage's text_length", encoded.sample_id
        )
    if max_length is not None and encoded.length > max_length:
        raise TooLongError(
            f"{encoded.length} positions ({tokens} text tokens and {len(encoded.views)} image(s){told_views(encoded)}) "
            f"exceed model.max_length={max_length}; raise it, or shorten the conversation",
            encoded.sample_id,
        )


def truncate(encoded: Encoded, text_length: int, max_length: int) -> tuple[Encoded, int]:
    """A conversation cut at its end to `text_length` text tokens and `max_length` positions, and how many were cut.

    An image is kept whole, with all its views, and only with text after it: one that does not fit, or that nothing
    follows any more, is left out, and all after it. Fewer `views` tell how many of the sample's images are left.

    Raises:
      DataError: nothing of what is left is supervised.
    """
    tokens = len(encoded.tokens)
    count = min(text_length, int(np.searchsorted(encoded.positions, max_length)))  # positions rise
    if count >= tokens:  # text follows every image, so that all fit
        return encoded, 0
    targets, loss_weights = encoded.targets[:count].copy(), encoded.loss_weights[:count].copy()
    targets[-1:], loss_weights[-1:] = 0, 0  # what it predicted is gone
    if not loss_weights.any():
        raise DataError(
            f"nothing supervised is left of {tokens} text tokens and {len(encoded.views)} image(s)"
            f"{told_views(encoded)} when cut to text_length={text_length} and model.max_length={max_length}; raise the "
            "stage's text_length or model.max_length, or set data.on_error=drop",
            encoded.sample_id,
        )
    positions = encoded.positions[:count]
    image_positions = encoded.image_positions[encoded.image_positions < positions[-1]]
    images = int(np.searchsorted(np.cumsum(encoded.views), len(image_positions), side="right"))
    return replace(
        encoded,
        tokens=encoded.tokens[:count],
        targets=targets,
        loss_weights=loss_weights,
        positions=positions,
        image_positions=image_positions,
        length=int(positions[-1]) + 1,
        views=encoded.views[:images],
    ), tokens - count


# --- Turns -----------------------------------------------------------------------------------------------------------


def _checked_turns(turns: Sequence[Turn], num_images: int | None, sample_id: str) -> list[Turn]:
    """The turns without outer white space, with a placeholder for every image, or DataError."""
    if not turns:
        raise DataError("no turns", sample_id)
    clean: list[Turn] = []
    for number, turn in enumerate(turns):
        if turn.role not in (USER, ASSISTANT):
            raise DataError(f"turn {number} has the unknown role {turn.role!r}; known: {USER}, {ASSISTANT}", sample_id)
        if turn.role != (USER, ASSISTANT)[number % 2]:
            wrong = "the conversation starts with" if number == 0 else f"turns {number - 1} and {number} are both of"
            raise DataError(f"{wrong} {turn.role!r}; user and assistant take turns, the user first", sample_id)
        text = turn.text.strip()
        if turn.role == ASSISTANT and not text:
            raise EmptyAnswerError(f"turn {number} is an empty answer", sample_id)
        if turn.role == ASSISTANT and IMAGE in text:
            raise DataError(f"turn {number} has {IMAGE} in an answer; images belong to user turns", sample_id)
        clean.append(replace(turn, text=image_first(text) if turn.role == USER else text))
    placeholders = sum(turn.text.count(IMAGE) for turn in clean)
    if num_images is None or placeholders == num_images:
        return clean
    if placeholders:
        raise DataError(
            f"{placeholders} {IMAGE} placeholder(s) for {num_images} image(s); write one for each, or none at all to "
            "put the images first",
            sample_id,
        )
    clean[0] = Turn(USER, (f"{IMAGE}\n" * num_images + clean[0].text).strip())
    return clean


def without_placeholders(text: str) -> str:
    """What somebody says who means no image by it: in a turn `<image>` stands for one."""
    return text.replace(IMAGE, "< image >")


def image_first(text: str) -> str:
    """A user's text with its only image, if that begins or ends it, in front and on a line of its own."""
    stripped, words = text.strip(), text.replace(IMAGE, "").strip()
    if text.count(IMAGE) != 1 or not words or not (stripped.startswith(IMAGE) or stripped.endswith(IMAGE)):
        return text
    return f"{IMAGE}\n{words}"


# --- Pieces ----------------------------------------------------------------------------------------------------------


@dataclass
class _Stream:
    """Tokens as they are written, one piece after the other."""

    num_patches: int
    views_of_images: Iterator[int] | None  # None: one each
    tokens: list[int] = field(default_factory=list)
    supervised: list[bool] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    image_positions: list[int] = field(default_factory=list)
    views: list[int] = field(default_factory=list)
    next_position: int = 0
    after: str = START  # what stands last: START, TEXT, CONTROL or PICTURE

    def add(self, ids: Sequence[int], supervised: bool = False, kind: str = TEXT) -> None:
        if not ids:
            return
        self.tokens += ids
        self.supervised += [supervised] * len(ids)
        if self.after == PICTURE:  # under SAISA no text token stands before it that has seen the image
            self.supervised[-len(ids)] = False
        self.after = kind
        self.positions += range(self.next_position, self.next_position + len(ids))
        self.next_position += len(ids)

    def add_image(self) -> None:
        views = 1 if self.views_of_images is None else next(self.views_of_images)
        self.image_positions += [self.next_position + n * self.num_patches for n in range(views)]
        self.views.append(views)
        self.next_position += views * self.num_patches
        self.after = PICTURE

    def encoded(self, sample_id: str) -> Encoded:
        return Encoded(
            sample_id=sample_id,
            tokens=np.array(self.tokens, np.int32),
            targets=np.array([*self.tokens[1:], 0], np.int32),
            loss_weights=np.array([*self.supervised[1:], False], np.float32),
            positions=np.array(self.positions, np.int32),
            image_positions=np.array(self.image_positions, np.int32),
            length=self.next_position,
            views=tuple(self.views),
        )


def _write(
    turns: Sequence[Turn],
    template: Template,
    tokenizer: PreTrainedTokenizerFast,
    num_patches: int,
    views: Sequence[int] | None,
    system_prompt: str | None,
    sample_id: str,
) -> _Stream:
    """The turns as a stream of tokens."""
    encoder = text_encoder(tokenizer)
    end = encoder.end(template)
    system = template.system if system_prompt is None else system_prompt
    frame = encoder.frame(template, (len(turns) + 1) // 2, bool(system))
    stream = _Stream(num_patches, None if views is None else iter(views))
    if template.bos and encoder.bos is not None:
        stream.add([encoder.bos], kind=START)
    for number, turn in enumerate(turns):
        if turn.role == USER:
            text = turn.text if template.user_words else IMAGE * turn.text.count(IMAGE)
            lead, tail = frame.leads[number // 2], frame.tails[number // 2]
            pieces = [*_split_controls(lead, frame.controls, system), *_split_images(text)]
            _add_pieces(stream, [*pieces, *_split_controls(tail, frame.controls, system)], encoder, template)
            if stream.after == PICTURE:
                raise DataError(f"turn {number} ends in an image: add text after {IMAGE}", sample_id)
        else:
            text = frame.answer.replace("{text}", turn.text)
            stream.add(encoder.ids(text, stream.after, template.own), supervised=turn.loss)
            stream.add([end], supervised=turn.loss, kind=CONTROL)
    return stream


def _split_controls(text: str, controls: tuple[str, ...], system: str) -> list[tuple[str, str]]:
    """A template's own text as (kind, value) pieces, kind being text or control, the system prompt filled in."""
    parts = re.split("(" + "|".join(map(re.escape, controls)) + ")", text) if controls else [text]
    return [("control", part) if part in controls else ("text", part.replace(SYSTEM, system)) for part in parts]


def _split_images(text: str) -> list[tuple[str, str]]:
    """A user's words as (kind, value) pieces, kind being text or image."""
    pieces: list[tuple[str, str]] = []
    for chunk in text.split(IMAGE):
        pieces += [("text", chunk), ("image", "")]
    return pieces[:-1]


def _add_pieces(stream: _Stream, pieces: list[tuple[str, str]], encoder: TextEncoder, template: Template) -> None:
    """Adds unsupervised pieces; texts that touch are tokenised as one."""
    text = ""
    for kind, value in [*pieces, ("done", "")]:
        if kind == "text":
            text += value
            continue
        if text:
            stream.add(encoder.ids(text, stream.after, template.own))
            text = ""
        if kind == "control":
            stream.add([encoder.control(value, template)], kind=CONTROL)
        elif kind == "image":
            stream.add_image()
