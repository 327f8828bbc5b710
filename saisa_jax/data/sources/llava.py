"""Conversations about images from JSON: LLaVA's own form, and chat messages as Hugging Face writes them.

    {"id": "1", "image": "a.jpg" or a list of them, "conversations": [{"from": "human", "value": "<image>\\nWhat?"},
                                                                      {"from": "gpt", "value": "A cat."}]}
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What?"}]},
                  {"role": "assistant", "content": "A cat."}]}

A sample without images is text alone. A record is checked when it is read, so that one bad sample can be left out.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from saisa_jax.config import SourceConfig
from saisa_jax.data.sample import ASSISTANT, USER, DataError, ImageSource, Sample, Turn
from saisa_jax.data.sources import SOURCES
from saisa_jax.data.sources.archives import open_images
from saisa_jax.data.sources.json_records import JsonRecords
from saisa_jax.data.text.conversation import IMAGE

SYSTEM = "system"
ROLES = {"human": USER, "user": USER, "gpt": ASSISTANT, "assistant": ASSISTANT, "system": SYSTEM}
PART_TYPES = ("text", "image")
_TRAILING_IMAGES = re.compile(rf"(\s*{re.escape(IMAGE)})+\s*$")

# (role, text) of each turn, and the names of the images.
Dialogue = tuple[list[tuple[str, str]], list[str]]


@SOURCES.register("chat")
@SOURCES.register("llava")
class JsonConversations:
    """Samples from a .json or .jsonl file and the images that they name."""

    def __init__(self, config: SourceConfig) -> None:
        """Opens a source of format `llava` or `chat`; without `sources.images`, names lead from the file's folder.

        Raises:
          DataError: file or images are not there, or the file is cut or malformed.
        """
        self.records = JsonRecords(config.path)
        self.images = open_images(config.images or Path(config.path).parent)
        self.form = config.format

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """Raises DataError with the sample's id if it is none of the form."""
        index = range(len(self))[index]
        record, name = self.records[index], self.records.name(index)
        if not isinstance(record, dict):
            raise DataError(f"a sample is an object {{...}}, this one is {_kind(record)}", name)
        given = record.get("id")
        sample_id = str(given) if isinstance(given, str | int) and str(given) else name
        sample_id = sample_id.encode("utf-8", "backslashreplace").decode()
        turns, names = FORMS[self.form](record, sample_id)
        return make_sample(sample_id, turns, tuple(self.images.find(name, sample_id) for name in names))


def make_sample(sample_id: str, said: Sequence[tuple[str, str]], images: Sequence[ImageSource]) -> Sample:
    """A sample of what was said, in (role, text) pairs, after the checks that all forms share.

    The system's words, if any, come first. Text after which a user's turn ends in images gets them in front, as LLaVA
    does to every turn: "What is this?\\n<image>" is "<image>\\nWhat is this?". An image in the middle stays there.

    Raises:
      DataError: a system turn that is not the first, two turns of one role in a row, no text at all, or another number
        of `<image>` than of images.
    """
    system = None
    if said and said[0][0] == SYSTEM:
        (_, system), said = said[0], said[1:]
    # Shared conversations may begin in the middle; LLaVA leaves out what the assistant says before the user does.
    if said and said[0][0] == ASSISTANT:
        said = said[1:]
    for number, (role, _) in enumerate(said):
        if role == SYSTEM:
            raise DataError("a system turn comes first, and there is one at most", sample_id)
        if role != (USER, ASSISTANT)[number % 2]:
            raise DataError(f"two turns of the {role} in a row; user and assistant take turns", sample_id)
    if not any(text.replace(IMAGE, "").strip() for _, text in said):
        raise DataError("no text: nothing is said in it", sample_id)
    placeholders = sum(text.count(IMAGE) for _, text in said)
    if placeholders and placeholders != len(images):
        raise DataError(
            f"{placeholders} {IMAGE} in the text and {len(images)} image(s); write one for each, or none at all to put "
            "the images first",
            sample_id,
        )
    turns: list[Turn] = []
    placed: list[ImageSource] = []
    for role, text in said:
        text, moved = _images_first(text) if role == USER else (text, 0)
        its = list(images[len(placed) : len(placed) + text.count(IMAGE)])
        placed += its[len(its) - moved :] + its[: len(its) - moved]
        turns.append(Turn(role, text))
    return Sample(sample_id, tuple(turns), tuple(placed or images), system=system)


def _images_first(text: str) -> tuple[str, int]:
    """A user's text with the images at its end moved to its front, and how many those are."""
    found = _TRAILING_IMAGES.search(text)
    if found is None or found.start() == 0:
        return text, 0
    count = found.group().count(IMAGE)
    return f"{IMAGE}\n" * count + text[: found.start()].strip(), count


# --- The forms -------------------------------------------------------------------------------------------------------


def _llava(record: Mapping[str, Any], sample_id: str) -> Dialogue:
    """{"image": name or names, "conversations": [{"from", "value"}]}."""
    given = record.get("image")
    names = [] if given is None else given if isinstance(given, list) else [given]
    turns = [
        (_role(turn.get("from"), f"conversations[{number}].from", sample_id),
         _text(turn.get("value"), f"conversations[{number}].value", sample_id))
        for number, turn in enumerate(_turns(record, "conversations", sample_id))
    ]  # fmt: skip
    return turns, [_text(name, "image", sample_id) for name in names]


def _chat(record: Mapping[str, Any], sample_id: str) -> Dialogue:
    """{"messages": [{"role", "content"}], "images": names}; an image part names its image, or takes the next one."""
    listed = record.get("images")
    if listed is not None and not isinstance(listed, list):
        raise DataError(f"images should be a list of names, not {_kind(listed)}", sample_id)
    rest = [_text(name, "images", sample_id) for name in listed or ()]
    turns: list[tuple[str, str]] = []
    names: list[str] = []
    for number, message in enumerate(_turns(record, "messages", sample_id)):
        role = _role(message.get("role"), f"messages[{number}].role", sample_id)
        content, where = message.get("content"), f"messages[{number}].content"
        if not isinstance(content, list):
            text = _text(content, where, sample_id)
            count = text.count(IMAGE)
            names, rest = names + rest[:count], rest[count:]
            turns.append((role, text))
            continue
        words: list[str] = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text":
                words.append(_text(part.get("text"), f"{where}.text", sample_id))
                if IMAGE in words[-1]:
                    raise DataError(f"{where} has {IMAGE} within a text; here images are parts", sample_id)
            elif kind == "image":
                if part.get("image") is None and not rest:
                    raise DataError(f"{where} has an image that neither it nor 'images' names", sample_id)
                name = part["image"] if part.get("image") is not None else rest.pop(0)
                names.append(_text(name, f"{where}.image", sample_id))
                words.append(IMAGE)
            else:
                raise DataError(f"{where} has a part of type {kind!r}; known: {', '.join(PART_TYPES)}", sample_id)
        turns.append((role, "\n".join(words)))
    return turns, names + rest


FORMS: dict[str, Callable[[Mapping[str, Any], str], Dialogue]] = {"llava": _llava, "chat": _chat}


def _turns(record: Mapping[str, Any], key: str, sample_id: str) -> list[dict[str, Any]]:
    turns = record.get(key)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        other = next((form for form, its in (("llava", "conversations"), ("chat", "messages")) if its in record), None)
        hint = f"; is it sources.format={other}?" if other and key not in record else ""
        raise DataError(f"{key!r} should be a list of turns, and is {_kind(turns)}{hint}", sample_id)
    return turns


def _role(value: Any, where: str, sample_id: str) -> str:
    if isinstance(value, str) and value in ROLES:
        return ROLES[value]
    near = difflib.get_close_matches(str(value), ROLES, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise DataError(f"{where}={str(value)[:80]!r} is an unknown role{hint}; known: {', '.join(ROLES)}", sample_id)


def _text(value: Any, where: str, sample_id: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} should be text, and is {_kind(value)}", sample_id)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON may write half of a surrogate pair, which no tokenizer takes
        raise DataError(f"{where} has half a character ({error.reason}) at {error.start}", sample_id) from error
    return value


def _kind(value: Any) -> str:
    known = {type(None): "missing", list: "a list", dict: "an object", str: "text", bool: "true or false"}
    if value == [] and isinstance(value, list):
        return "an empty list"
    return known.get(type(value), "a number")
