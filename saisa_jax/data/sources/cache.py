"""Where copies lie that are read instead of a file in a bucket, or a packed one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from saisa_jax.compilation import cache_root

_SHARE = 0.8  # of the free disk, where no bound is given
_lock = threading.Lock()
_copying: dict[Path, int] = {}  # bytes of the copies that threads of this process make now


def write_copy(source: Any, target: Path) -> None:
    """Copies an open file to a file that is not there before it is whole; other processes may do the same."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            shutil.copyfileobj(source, file, 2**24)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def copy_once(source: Callable[[], Any], target: Path, size: int) -> None:
    """As `write_copy`, of a file of a known size; of the processes of this host one copies, the others wait for it.

    Args:
      source: opens it.
      target: the copy.
      size: bytes.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    with contextlib.ExitStack() as stack:
        stack.callback(_copying.pop, target, None)
        file = stack.enter_context(part.open("ab"))
        with contextlib.suppress(OSError):  # a file system without locks: each copies its own, and the last one stays
            fcntl.flock(file, fcntl.LOCK_EX)
        if not is_copy(target, size):  # another process has not made it meanwhile
            file.truncate(0)
            with source() as read:
                shutil.copyfileobj(read, file, 2**24)
            file.flush()
            os.replace(part, target)
        elif part.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
            part.unlink()


def is_copy(target: Path, size: int) -> bool:
    """Whether a whole copy is there."""
    try:
        return target.stat().st_size == size
    except FileNotFoundError:
        return False


def room_for_copies(bound: int | None, suffix: str) -> int:
    """Bytes that this host's copies of a kind may take: the bound, or a share of what the disk could hold of them."""
    if bound is not None:
        return bound
    folder = cache_root()
    folder.mkdir(parents=True, exist_ok=True)
    return int(_SHARE * (shutil.disk_usage(folder).free + sum(size for _, size, _ in _copies(suffix))))


def make_room(target: Path, size: int, bound: int | None, suffix: str, keep: Collection[Path], force: bool) -> bool:
    """Removes the copies of this host that were opened longest ago until there is room for another one.

    A file that a process has open can be read to its end. The room is this copy's until `copy_once` has made it.

    Args:
      target: the new copy.
      size: its bytes.
      bound: bytes of all copies together; None: a share of the disk.
      suffix: of the copies' names.
      keep: copies that are removed last, and only with `force`.
      force: whether the new copy cannot wait.

    Returns:
      Whether there is room.
    """
    with _lock:
        room, copies = room_for_copies(bound, suffix) - size, sorted(_copies(suffix))
        used = sum(size for _, size, _ in copies) + sum(_copying.values())
        for kept in (False, True) if force else (False,):
            for _, bytes_, path in copies:
                if used > room and (path in keep) is kept and path.exists():
                    path.unlink(missing_ok=True)
                    used -= bytes_
        if force or used <= room:
            _copying[target] = size
        return used <= room


def _copies(suffix: str) -> list[tuple[int, int, Path]]:
    """When each copy was last opened, its bytes, and its path."""
    found = []
    for path in cache_root().glob(f"*/*{suffix}"):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            seen = path.stat()
            found.append((seen.st_mtime_ns, seen.st_size, path))
    return found
