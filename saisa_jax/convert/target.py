"""The directory that a conversion writes: new, writable, large enough, and under its name only when it is whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from saisa_jax import buckets
from saisa_jax.convert.rows import ConvertError


def check_target(to: str | os.PathLike[str]) -> epath.Path:
    """A directory, local or in a bucket, that is new or empty, and can be written.

    Raises:
      ConvertError: it is not.
    """
    to = buckets.place(to)
    if buckets.is_remote(to):
        if buckets.children(to):
            raise ConvertError(f"{to} exists already; name a place where nothing is")
        return to
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConvertError(f"{to} exists already; name a directory that does not")
    parent = next(path for path in (to.resolve(), *to.resolve().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConvertError(f"{to} cannot be written: {parent} is {'not writable' if parent.is_dir() else 'a file'}")
    return to


def check_room(needed: int, to: epath.Path) -> None:
    """Raises ConvertError if the disk has less than `needed` bytes left; a bucket has no end."""
    if buckets.is_remote(to):
        return
    parent = next(path for path in (to.resolve(), *to.resolve().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ConvertError(f"{to} needs {needed / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB left")


@contextlib.contextmanager
def written_whole(to: epath.Path) -> Iterator[Path]:
    """A directory beside `to` that takes its name when the block has ended well, and is removed otherwise.

    For a bucket it is a local one, which is uploaded when the block has ended well.
    """
    if buckets.is_remote(to):
        mirror = buckets.Mirror(to)
        try:
            yield mirror.local
            mirror.upload()
        finally:
            shutil.rmtree(mirror.local)
        return
    unfinished = Path(to.resolve().parent / f".{to.name}.unfinished")
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
