"""The error that its reader can mend, and the nearest names that one may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user can mend; the message is all that a command shows, without a traceback."""


def did_you_mean(name: str, known: Iterable[str], *, n: int = 1, otherwise: str = "") -> str:
    """`; did you mean ...?` with up to `n` of the known names that are spelt like `name`; if none is, `otherwise`."""
    near = difflib.get_close_matches(name, list(known), n=n)
    return f"; did you mean {' or '.join(near)}?" if near else otherwise
