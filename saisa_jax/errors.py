"""The base class of errors that a user can fix, and suggestions of the nearest names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can fix; a command shows its message alone, without a traceback."""


def did_you_mean(name: str, known: Iterable[str], *, n: int = 1, otherwise: str = "") -> str:
    """`; did you mean ...?` with up to `n` of the known names that are spelt like `name`; if none is, `otherwise`."""
    near = difflib.get_close_matches(name, list(known), n=n)
    return f"; did you mean {' or '.join(near)}?" if near else otherwise
