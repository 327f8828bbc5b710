"""The directory that a conversion writes: new, writable, large enough, and under its name only when it is whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from saisa_jax.convert.rows import ConvertError


def check_target(to: str | Path) -> Path:
    """A directory that is new or empty, and can be written.

    Raises:
      ConvertError: it is not.
    """
    to = Path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConvertError(f"{to} exists already; name a directory that does not")
    parent = next(path for path in (to.resolve(), *to.resolve().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConvertError(f"{to} cannot be written: {parent} is {'not writable' if parent.is_dir() else 'a file'}")
    return to


def check_room(needed: int, to: Path) -> None:
    """Raises ConvertError if the disk has less than `needed` bytes left."""
    parent = next(path for path in (to.resolve(), *to.resolve().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ConvertError(f"{to} needs {needed / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB left")


@contextlib.contextmanager
def written_whole(to: Path) -> Iterator[Path]:
    """A directory beside `to` that takes its name when the block has ended well, and is removed otherwise."""
    unfinished = to.resolve().parent / f".{to.name}.unfinished"
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        if to.exists():
            to.rmdir()
        unfinished.rename(to)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
