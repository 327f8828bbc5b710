"""Files on a disk and in a bucket (`gs://`, `s3://`), in the one way that both can go.

A bucket has objects, which appear whole or not at all, and no directories: nothing can be appended to, renaming copies
every byte, and a directory is there as long as an object lies in it. Paths are `etils.epath`'s; what is said here holds
for all places where runs, models and prepared data are written.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from etils import epath

from saisa_jax.errors import UserError

PathLike = str | os.PathLike[str]
AnyPath = Path | epath.Path


class BucketError(UserError, ImportError):
    """A bucket whose file system is not installed."""


def is_remote(path: PathLike) -> bool:
    """Whether a path lies in a bucket."""
    return "://" in os.fspath(path)


def place(path: PathLike) -> epath.Path:
    """A path, ready to be used.

    Raises:
      BucketError: the bucket's file system is not installed.
    """
    if is_remote(path):
        _connect(os.fspath(path).partition("://")[0])
    return epath.Path(path)


def absolute(path: PathLike) -> epath.Path:
    """A local path with its links followed; one in a bucket as it is, which `resolve` would look for here.

    Raises:
      BucketError: the bucket's file system is not installed.
    """
    return place(path) if is_remote(path) else epath.Path(path).resolve()


@functools.cache
def _connect(scheme: str) -> None:
    """Has listings read anew every time: what TensorStore and other hosts write is not in fsspec's memory of them."""
    package = {"gs": "gcsfs", "s3": "s3fs"}.get(scheme)
    if package is None:
        raise BucketError(f"{scheme}:// is not served: gs:// and s3:// are, and local paths")
    import fsspec.config

    protocol = {"gs": "gcs"}.get(scheme, scheme)
    fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise BucketError(f"{scheme}:// needs its file system: pip install {package}") from error


def children(directory: epath.Path) -> list[epath.Path]:
    """What lies in a directory, sorted by name; nothing if it is not there, as one of a bucket is when it is empty."""
    try:
        return sorted(path for path in directory.iterdir() if path.name)
    except FileNotFoundError:
        return []


def sizes(directory: epath.Path) -> dict[str, int]:
    """The bytes of every file in a directory, by name, in one listing: to ask for each would take a round trip each."""
    if not is_remote(directory):
        with os.scandir(directory) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    import fsspec.core

    system, path = fsspec.core.url_to_fs(os.fspath(directory))
    return {entry["name"].rpartition("/")[2]: entry["size"] for entry in system.ls(path, detail=True)}


def walk(directory: epath.Path) -> list[epath.Path]:
    """All files below a directory, sorted; none if it is not there."""
    found: list[epath.Path] = []
    for path in children(directory):
        found += walk(path) if path.is_dir() else [path]
    return found


def write_text(path: epath.Path, text: str) -> None:
    """Writes a small file that is not there before it is whole; an older one stays until then."""
    if is_remote(path):
        path.write_text(text)
        return
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


def append_text(path: epath.Path, text: str) -> None:
    """Adds to the end of a small file; one in a bucket is written anew. For many rows take a `Mirror`."""
    if is_remote(path):
        path.write_text((path.read_text() if path.exists() else "") + text)
        return
    with path.open("a") as file:
        file.write(text)


def move(old: epath.Path, new: epath.Path) -> None:
    """Renames a directory; in a bucket object by object, so that one which is stopped leaves both in part."""
    if not is_remote(old):
        old.rename(new)
        return
    for path in walk(old):
        target = new / os.fspath(path)[len(os.fspath(old)) :].lstrip("/")
        path.copy(target, overwrite=True)
    old.rmtree()


def remove(directory: epath.Path) -> None:
    """Removes a directory, if it is there."""
    if directory.exists():
        directory.rmtree()


def copy_file(source: AnyPath, target: AnyPath) -> None:
    """Copies a file of any size from a disk or a bucket to either."""
    with source.open("rb") as read, target.open("wb") as written:
        shutil.copyfileobj(read, written, 2**24)


def local_copies(files: Sequence[epath.Path], directory: PathLike) -> list[Path]:
    """Files below a directory, on this disk: of a bucket's copies in the same order, which last as long as the process.

    They lie to each other as they do in `directory`.
    """
    if not is_remote(directory):
        return [Path(file) for file in files]
    folder = Path(tempfile.mkdtemp(prefix="saisa_jax-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copies = []
    for file in files:
        copies.append(folder / os.fspath(file).removeprefix(os.fspath(directory)).lstrip("/"))
        copies[-1].parent.mkdir(parents=True, exist_ok=True)
        copy_file(file, copies[-1])
    return copies


class Mirror:
    """A directory whose files grow: on a disk the directory itself, for a bucket a local copy that is uploaded.

    Files are written in `local`. `upload` brings what has changed into the bucket, whole files; it does nothing on a
    disk. Use it as a context manager, or call `close`, which uploads for the last time.

    Args:
      directory: made if it is not there.
      names: of the files to begin with; of them the local copy is made.
      seconds: between two uploads, unless one is forced.

    Attributes:
      local: where to write.
    """

    def __init__(self, directory: epath.Path, names: tuple[str, ...] = (), seconds: float = 20.0):
        self.directory, self._seconds = directory, seconds
        self._remote = is_remote(directory)
        self._last = time.monotonic()
        self._uploaded: dict[str, tuple[int, int]] = {}
        if not self._remote:
            directory.mkdir(parents=True, exist_ok=True)
            self.local = Path(directory)
            return
        self.local = Path(tempfile.mkdtemp(prefix="saisa_jax-"))
        for name in names:
            if (directory / name).exists():
                (self.local / name).write_bytes((directory / name).read_bytes())
                self._uploaded[name] = _version(self.local / name)

    def __enter__(self) -> Mirror:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def upload(self, force: bool = True) -> None:
        """Brings changed files into the bucket; unless forced, at most every so many seconds."""
        if not self._remote or (not force and time.monotonic() - self._last < self._seconds):
            return
        self._last = time.monotonic()
        for file in sorted(path for path in self.local.rglob("*") if path.is_file()):
            name, version = file.relative_to(self.local).as_posix(), _version(file)
            if self._uploaded.get(name) == version:
                continue
            copy_file(file, self.directory / name)
            self._uploaded[name] = version

    def close(self) -> None:
        """Uploads, and removes the local copy; may be called twice."""
        if self._remote and self.local.exists():
            self.upload()
            shutil.rmtree(self.local)


@contextlib.contextmanager
def appending(path: epath.Path) -> Iterator[Callable[[str], None]]:
    """Adds text to a file again and again. On a disk it is there at once, in a bucket as a `Mirror` brings it."""
    with Mirror(path.parent, (path.name,)) as mirror, (mirror.local / path.name).open("a") as file:

        def append(text: str) -> None:
            file.write(text)
            file.flush()
            mirror.upload(force=False)

        yield append


def _version(file: Path) -> tuple[int, int]:
    seen = file.stat()
    return seen.st_size, seen.st_mtime_ns
