"""What both sides say, made of named values: `sources.turns="{question} => {answer}"`."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from saisa_jax.data.sample import ASSISTANT, USER, DataError, Turn
from saisa_jax.errors import did_you_mean


class TurnsTemplate:
    """The two sides, with names in braces; a brace that is text is written twice."""

    def __init__(self, turns: str, known: Sequence[str], owner: str, noun: str = "feature") -> None:
        """Checks the names.

        Args:
          turns: "{question} => {answer}"; a caption is " => {caption}".
          known: the names that there are; those within another are written outer/inner.
          owner: what has them, for errors.
          noun: what it calls them.

        Raises:
          DataError: braces that do not match or hold more than a name, or a name that is not known.
        """
        self.sides = tuple(side.strip() for side in turns.split("=>"))
        self.names: list[str] = []
        for side in self.sides:
            try:
                parts = list(string.Formatter().parse(side))
            except ValueError as error:
                raise DataError(f"sources.turns={turns!r}: {error}; a brace that is text is written twice") from error
            if any(spec or conversion for _, _, spec, conversion in parts):
                raise DataError(f"sources.turns={turns!r}: braces hold a {noun}'s name and nothing else")
            for _, name, *_ in parts:
                if name is not None:
                    check_name(name, known, "turns", owner, noun)
                    self.names.append(name)

    def __call__(self, value: Callable[[str], str]) -> list[Turn]:
        """The turns, with `value(name)` in the place of each name."""
        said = []
        for side in self.sides:
            words = []
            for literal, name, *_ in string.Formatter().parse(side):
                words += [literal, "" if name is None else value(name)]
            said.append("".join(words))
        return [Turn(USER, said[0]), Turn(ASSISTANT, said[1])]


def check_name(name: str, known: Sequence[str], field: str, owner: str, noun: str = "feature") -> None:
    """Raises DataError for a name that is not known; `field` of the source has it."""
    if name not in known:
        hint = did_you_mean(name, known, n=2, otherwise=f"; it has {', '.join(known)}")
        raise DataError(f"sources.{field}: {owner!r} has no {noun} {name!r}{hint}")


def entries(value: Any) -> Sequence[Any]:
    """The entries of a list, or the value itself as the only one; none if it is missing."""
    if value is None or (isinstance(value, bytes) and not value):
        return ()
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim):
        return list(value)
    return (value,)


def as_text(value: Any, label: Callable[[int], str] | None = None) -> str:
    """A value as text: bytes decoded, a class by its label, of a list the first entry, "" of an empty one."""
    found = entries(value)
    first = found[0] if len(found) else b""
    if isinstance(first, bytes):
        return first.decode("utf-8", "replace")
    return label(int(first)) if label else str(first)
