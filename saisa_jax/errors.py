"""The base class of errors that a user can fix, and suggestions of the nearest names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can fix; a command shows its message alone, without a traceback."""


def nearest(name: str, known: Iterable[str], *, n: int = 1, cutoff: float = 0.6) -> list[str]:
    """Up to `n` of the known names that are spelt like `name`, the nearest first; `cutoff` in 0..1: 1 is the same."""
    return difflib.get_close_matches(name, list(known), n=n, cutoff=cutoff)


def did_you_mean(name: str, known: Iterable[str], *, n: int = 1, cutoff: float = 0.6, otherwise: str = "") -> str:
    """`; did you mean ...?` with the `nearest` of the known names; if none is near, `otherwise`."""
    near = nearest(name, known, n=n, cutoff=cutoff)
    return f"; did you mean {' or '.join(near)}?" if near else otherwise
