"""Flags of benches: lists of names and of numbers, and the folder for what they write."""

from __future__ import annotations

from collections.abc import Collection

from etils import epath
from rich.console import Console

from saisa_jax.config import ConfigError
from saisa_jax.errors import did_you_mean

DTYPES = ("float32", "bfloat16")  # that benches measure


def choices(flag: str, text: str, known: Collection[str]) -> list[str]:
    """A flag's list of names, `a,b`.

    Raises:
      ConfigError: a name that is not known.
    """
    names = text.split(",")
    for name in names:
        if name not in known:
            hint = did_you_mean(name, list(known), n=3)
            raise ConfigError(f"--{flag}={text}: {name!r} is none of {', '.join(known)}{hint}")
    return names


def numbers(flag: str, text: str) -> list[int]:
    """A flag's list of positive numbers, `1,8`.

    Raises:
      ConfigError: something else.
    """
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise ConfigError(f"--{flag}={text} is no list of positive numbers like 1,8")
    return found


def output_folder(name: str | None) -> epath.Path | None:
    """The folder that `--output` names, made if it is not there; None: none was named."""
    if name is None:
        return None
    folder = epath.Path(name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def wide_console() -> Console:
    """On which tables are as wide as they are where the output is a file."""
    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=140)
