"""MMMU's own evaluation (MMMU-Benchmark/MMMU, eval_utils.py), and what lmms-eval has changed in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# --- Multiple choice -------------------------------------------------------------------------------------------------


# Forms of a letter, the surest first, and how the last of several is found then.
OFFICIAL = (("({})", "({})"), (" {} ", " {} "))
# lmms-eval takes "B " and "B." too, within words; where none stands as " B " the first counts.
LMMS = (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} "))


def choice(output: str, options: Mapping[str, str], forms: Sequence[tuple[str, str]] = OFFICIAL) -> str:
    """The letter that an answer means; "" if it must be guessed.

    A letter in one of the `forms`; else, in more than five words, the text of an option. Of several the last is taken.

    Args:
      options: {"A": its text, ...}.
    """
    text = output
    for sign in ",.!?;:'":
        text = text.strip(sign)
    text = f" {text} "
    for form, place in forms:
        found = [letter for letter in options if form.format(letter) in text]
        if found:
            return max(found, key=lambda letter: text.rfind(place.format(letter)))
    low = text.lower()
    found = [letter for letter, words in options.items() if words.lower() in low] if len(text.split()) > 5 else []
    return max(found, key=lambda letter: low.rfind(options[letter].lower()), default="")


# --- Open questions --------------------------------------------------------------------------------------------------

Value = str | float

_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # with commas
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def open_values(output: str) -> list[Value]:
    """What an open answer may say: the ends of its sentences after words such as "is", and all numbers in them."""
    text = output.strip().strip(".").lower()
    sentences = re.split(r"\.\s(?=[A-Z])|\n", text)
    found = []
    for number, sentence in enumerate(sentences):
        keys = (*_KEYS, "=") if number == len(sentences) - 1 else _KEYS
        ends = [sentence.split(key)[-1].strip() for key in keys if key in sentence]
        # An empty end does not stay the shortest one, as the published loop goes on from it.
        shortest = ""
        for end in ends:
            if not shortest or len(end) < len(shortest):
                shortest = end
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            found.append(shortest)
    found = found or [text]
    found += [number for part in found for pattern in _NUMBERS for number in re.findall(pattern, part)]
    return list(dict.fromkeys(value for part in found for value in _values(part)))


def open_correct(values: Sequence[Value], answer: str | Sequence[str]) -> bool:
    """Whether one of an answer's values is a right number (to two decimals), or has a right text in it."""
    right = [value for one in ([answer] if isinstance(answer, str) else answer) for value in _values(one)]
    return any(
        any(isinstance(text, str) and text in value for text in right) if isinstance(value, str) else value in right
        for value in values
    )


def _values(text: str) -> list[Value]:
    """A number to two decimals; or a text in small letters, of one letter with a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
