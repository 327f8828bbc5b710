"""Keys and values on the way from the front to vLLM: a folder of bounded size, in shared memory or on a disk.

Each file is one run of places (`runs.py`) and appears whole or not at all: it is written beside its name and renamed.
The front owns the folder and evicts what was used least recently, but never what a question that is being answered may
need. The connector only reads.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from saisa_jax_vllm.runs import KEY

SUFFIX, HALF = ".safetensors", ".half"


class StoreError(ValueError):
    """The folder cannot be used."""


def path_of(folder: str | os.PathLike[str], key: str) -> Path:
    """The file of a key."""
    return Path(folder) / f"{key}{SUFFIX}"


class Store:
    """The front's side. Threads may share it.

    Args:
      folder: made if it is not there; of one front alone.
      max_bytes: of files. Those that are held now may exceed it.

    Attributes:
      nbytes: of all files.
      written: files so far.

    Raises:
      StoreError: another front has it.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder).absolute(), max_bytes
        self.nbytes = self.written = 0
        self._sizes: OrderedDict[str, int] = OrderedDict()  # the one used last comes last
        self._held: Counter[str] = Counter()
        self._lock = threading.RLock()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._owner = (self.folder / "owner").open("a")
        try:
            fcntl.flock(self._owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._owner.close()
            raise StoreError(
                f"--store={self.folder} is that of another front, which is running: name another folder"
            ) from error
        for half in self.folder.glob(f"*{HALF}"):  # of one that was killed
            half.unlink()
        found = [file for file in self.folder.glob(f"*{SUFFIX}") if KEY.fullmatch(file.stem)]
        for file in sorted(found, key=lambda file: file.stat().st_mtime):
            self._sizes[file.stem] = file.stat().st_size
        self.nbytes = sum(self._sizes.values())
        self._evict()

    def __len__(self) -> int:
        return len(self._sizes)

    def close(self) -> None:
        """Lets another front have the folder."""
        self._owner.close()

    @contextlib.contextmanager
    def holding(self, keys: Sequence[str]) -> Iterator[None]:
        """While it lasts, none of these is evicted."""
        with self._lock:
            self._held.update(keys)
        try:
            yield
        finally:
            with self._lock:
                self._held.subtract(keys)
                self._held = +self._held
                self._evict()

    def has(self, key: str) -> bool:
        """Whether the file is there, which counts as a use of it."""
        with self._lock:
            if key not in self._sizes:
                return False
            if not path_of(self.folder, key).exists():  # somebody has tidied up
                self.forget(key)
                return False
            self._sizes.move_to_end(key)
            return True

    def put(self, key: str, write: Callable[[Path], None]) -> None:
        """Keeps what `write` writes to a path, and evicts until all fit."""
        half = self.folder / f"{key}{HALF}"
        try:
            write(half)
            size = half.stat().st_size
            with self._lock:
                self.forget(key)
                half.replace(path_of(self.folder, key))
                self._sizes[key] = size
                self.nbytes += size
                self.written += 1
                self._evict()
        finally:
            half.unlink(missing_ok=True)

    def forget(self, key: str) -> None:
        """Removes a file, if it is there."""
        with self._lock:
            self.nbytes -= self._sizes.pop(key, 0)
            path_of(self.folder, key).unlink(missing_ok=True)

    def _evict(self) -> None:
        for key in [key for key in self._sizes if key not in self._held]:
            if self.nbytes <= self.max_bytes:
                return
            self.forget(key)
