"""Conversations about images from JSON: LLaVA's own form, and chat messages as Hugging Face writes them.

    {"id": "1", "image": "a.jpg" or a list of them, "conversations": [{"from": "human", "value": "<image>\\nWhat?"},
                                                                      {"from": "gpt", "value": "A cat."}]}
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What?"}]},
                  {"role": "assistant", "content": "A cat."}], "images": names}

Both forms take their pictures from `image` and `images`, each a name, a data URL, an object (`pictures.py`) or a list
of those; the system's words from `system`, `system_prompt` or a first turn; and learn no turn that says `weight: 0`,
`train: false`, `loss: false`, `loss_mask: 0` or the like (`LOSS`). A sample without images is text alone. A record is
checked when it is read, so that one bad sample can be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saisa_jax.config import SourceConfig
from saisa_jax.data.sample import ASSISTANT, USER, DataError, EmptyAnswerError, ImageSource, Sample, Turn
from saisa_jax.data.sources import SOURCES
from saisa_jax.data.sources.archives import open_images
from saisa_jax.data.sources.json_records import JsonRecords
from saisa_jax.data.sources.pictures import OBJECT_KEYS, check_unread, find_picture
from saisa_jax.data.text.conversation import IMAGE, image_first
from saisa_jax.errors import did_you_mean

SYSTEM = "system"
ROLES = {"human": USER, "user": USER, "gpt": ASSISTANT, "assistant": ASSISTANT, "system": SYSTEM}
TOOL_ROLES = ("tool", "function", "function_call", "tool_call", "observation", "ipython")
PART_TYPES = ("text", "image", "image_url")
PICTURES = ("image", "images")
SYSTEMS = ("system", "system_prompt")
# Of a turn: 0 or false where it is context alone. `training` is axolotl's name for it.
LOSS = ("weight", "train", "training", "trainable", "train_on_turn", "learn", "loss", "loss_mask")


@dataclass(frozen=True)
class Dialogue:
    """What a record says."""

    turns: list[Turn]  # the system's among them
    pictures: list[tuple[str, Any]]  # in the order in which they stand: (field, what it says)


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
        self.form, self.allow_absolute = config.format, config.allow_absolute

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
        said = FORMS[self.form](record, sample_id)
        pictures = [
            find_picture(given, where, self.images, self.allow_absolute, sample_id) for where, given in said.pictures
        ]
        return make_sample(sample_id, said.turns, pictures)


def make_sample(sample_id: str, said: Sequence[Turn], images: Sequence[ImageSource]) -> Sample:
    """A sample of what was said, after the checks that all forms share. The system's words, if any, come first.

    A turn's only image stands in front of it where it began or ended it, as `encode` puts it.

    Raises:
      DataError: a system turn that is not the first, two turns of one role in a row, no text at all, or another number
        of `<image>` than of images.
    """
    system = None
    if said and said[0].role == SYSTEM:
        system, said = said[0].text, said[1:]
    # Shared conversations may begin in the middle; LLaVA leaves out what the assistant says before the user does.
    if said and said[0].role == ASSISTANT:
        said = said[1:]
    for number, turn in enumerate(said):
        if turn.role == SYSTEM:
            raise DataError("a system turn comes first, and there is one at most", sample_id)
        if turn.role != (USER, ASSISTANT)[number % 2]:
            raise DataError(f"two turns of the {turn.role} in a row; user and assistant take turns", sample_id)
    if not any(turn.text.replace(IMAGE, "").strip() for turn in said):
        kind = EmptyAnswerError if any(turn.role == ASSISTANT for turn in said) else DataError
        raise kind("no text: nothing is said in it", sample_id)
    placeholders = sum(turn.text.count(IMAGE) for turn in said)
    if placeholders and placeholders != len(images):
        raise DataError(
            f"{placeholders} {IMAGE} in the text and {len(images)} image(s); write one for each, or none at all to put "
            "the images first",
            sample_id,
        )
    turns = tuple(replace(turn, text=image_first(turn.text)) if turn.role == USER else turn for turn in said)
    return Sample(sample_id, turns, tuple(images), system=system)


# --- The forms -------------------------------------------------------------------------------------------------------


def _llava(record: Mapping[str, Any], sample_id: str) -> Dialogue:
    """{"image": name or names, "conversations": [{"from", "value"}]}."""
    pictures = _listed(record, sample_id)
    turns = _system(record, sample_id)
    check_unread(record, (*PICTURES, *SYSTEMS, "conversations"), "", bool(pictures), sample_id)
    for number, turn in enumerate(_turns(record, "conversations", sample_id)):
        where = f"conversations[{number}]"
        role = _role(turn.get("from"), f"{where}.from", sample_id)
        text = _text(turn.get("value"), f"{where}.value", sample_id)
        check_unread(turn, ("from", "value", *LOSS), f"{where}.", False, sample_id)
        turns.append(Turn(role, text, _loss(turn, where, sample_id)))
    return Dialogue(turns, pictures)


def _chat(record: Mapping[str, Any], sample_id: str) -> Dialogue:
    """{"messages": [{"role", "content"}], "images": names}; an image part names its image, or takes the next one."""
    listed = _listed(record, sample_id)
    turns = _system(record, sample_id)
    pictures: list[tuple[str, Any]] = []
    rest = list(range(len(listed)))  # of `listed`: not shown yet
    numbered = following = False

    def show(index: int | None, where: str) -> None:
        """Shows one of the listed pictures, the next one if none is said."""
        nonlocal numbered, following
        numbered, following = numbered or index is not None, following or index is None
        if numbered and following:
            raise DataError(f"{where}: some images say their index and others do not", sample_id)
        if index is None and not rest:
            raise DataError(f"{where} has an image that neither it nor 'images' names", sample_id)
        place = rest[0] if index is None else index
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(listed):
            raise DataError(f"{where}.index={place!r} is not one of {len(listed)} image(s), from 0", sample_id)
        pictures.append(listed[place])
        if place in rest:
            rest.remove(place)

    messages = _turns(record, "messages", sample_id)
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        role = _role(message.get("role"), f"{where}.role", sample_id)
        content = message.get("content")
        if isinstance(content, list):
            words: list[str] = []
            for part in content:
                words.append(_part(part, f"{where}.content", pictures, show, sample_id))
            text = "\n".join(words)
        else:
            text = _text(content, f"{where}.content", sample_id)
            for _ in range(min(text.count(IMAGE), len(rest))):  # too few are told of together
                show(None, f"{where}.content")
        turns.append(Turn(role, text, _loss(message, where, sample_id)))
    pictures += [listed[place] for place in rest]
    check_unread(record, (*PICTURES, *SYSTEMS, "messages"), "", bool(pictures), sample_id)
    for number, message in enumerate(messages):
        check_unread(message, ("role", "content", *LOSS), f"messages[{number}].", False, sample_id)
    return Dialogue(turns, pictures)


def _part(
    part: Any,
    where: str,
    pictures: list[tuple[str, Any]],
    show: Callable[[int | None, str], None],
    sample_id: str,
) -> str:
    """The text of one part of a message; its image is added to `pictures`."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        text = _text(part.get("text"), f"{where}.text", sample_id)
        if IMAGE in text:
            raise DataError(f"{where} has {IMAGE} within a text; here images are parts", sample_id)
        check_unread(part, ("type", "text", "index"), f"{where}.", False, sample_id)
        return text
    if kind not in PART_TYPES:
        raise DataError(f"{where} has a part of type {kind!r}; known: {', '.join(PART_TYPES)}", sample_id)
    check_unread(part, ("type", "index", *OBJECT_KEYS), f"{where}.", False, sample_id)
    given = {key: part[key] for key in OBJECT_KEYS if part.get(key) is not None}
    if given:
        pictures.append((where, given))
    else:
        show(part.get("index"), where)
    return IMAGE


FORMS: dict[str, Callable[[Mapping[str, Any], str], Dialogue]] = {"llava": _llava, "chat": _chat}


def _listed(record: Mapping[str, Any], sample_id: str) -> list[tuple[str, Any]]:
    """The record's pictures: (field, what it says) each."""
    given = {key: record[key] for key in PICTURES if record.get(key) is not None and record[key] != []}
    lists = {key: value if isinstance(value, list) else [value] for key, value in given.items()}
    if len(lists) > 1 and lists["image"] != lists["images"]:
        raise DataError("'image' and 'images' name different pictures; expected one of the two", sample_id)
    for key, names in lists.items():
        for name in names:
            if not isinstance(name, str | dict):
                raise DataError(f"{key} should be text, an object, or a list of those; it has {_kind(name)}", sample_id)
        return [(key, _text(name, key, sample_id) if isinstance(name, str) else name) for name in names]
    return []


def _system(record: Mapping[str, Any], sample_id: str) -> list[Turn]:
    """The system's words that stand beside the turns; nothing where there are none, or they are empty."""
    given = {key: _text(record[key], key, sample_id) for key in SYSTEMS if record.get(key)}
    if len(set(given.values())) > 1:
        raise DataError("'system' and 'system_prompt' say different things; expected one of the two", sample_id)
    return [Turn(SYSTEM, text) for text in given.values()][:1]


def _loss(turn: Mapping[str, Any], where: str, sample_id: str) -> bool:
    """Whether a turn is learned, if it is an answer."""
    given = {key: turn[key] for key in LOSS if turn.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):  # true and false are
            raise DataError(f"{where}.{key} should be true or false, 1 or 0, and is {str(value)[:80]!r}", sample_id)
    return all(given.values())


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
    hint = did_you_mean(str(value), ROLES)
    if str(value).lower() in TOOL_ROLES:
        hint = "; calls of tools are not served: leave such samples out"
    raise DataError(f"{where}={str(value)[:80]!r} is an unknown role, not one of {', '.join(ROLES)}{hint}", sample_id)


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
