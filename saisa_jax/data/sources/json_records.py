"""The records of a .json array or a .jsonl file, at random, without holding them in memory.

The file is read once, strictly, for where its records begin and end; a record is parsed again when it is asked for. One
that is packed as .gz or .zst is first unpacked to the cache (`cache.py`), once for as long as it stays what it is.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import mmap
import os
import re
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from saisa_jax.compilation import cache_root
from saisa_jax.data.sample import DataError, SourceChangedError
from saisa_jax.data.sources.cache import write_copy

_SPACE = re.compile(r"[ \t\n\r]*")
_BOM = "\ufeff".encode().decode("latin-1")
_BOMS_OF_UTF_16 = ("\xff\xfe", "\xfe\xff")  # as Latin-1


class JsonRecords:
    """Parsed records by index; safe to share among threads, small when pickled (16 bytes for each record)."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads the file once.

        Raises:
          DataError: it is not there, is neither .json nor .jsonl (nor packed as .gz or .zst), is cut or malformed (the
            message names the line and the byte), or is no array.
        """
        self.path = os.fspath(path)
        if "://" in self.path:
            raise DataError(
                f"sources.path={self.path!r} is not on a disk: copy it here, or train from what `data prepare` writes"
            )
        try:
            self._plain = _unpacked(self.path)
            stat = os.stat(self._plain)
            self._version = (stat.st_mtime_ns, stat.st_size)
            self.bounds = _find_records(self._plain, *self._version, self.path)
        except OSError as error:
            raise DataError(f"sources.path={self.path!r} cannot be read: {error.strerror or error}") from error
        self._lock, self._file = threading.Lock(), -1

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: int) -> Any:
        """Raises SourceChangedError if the file has changed, and DataError if the record's text is not UTF-8."""
        start, stop = (int(bound) for bound in self.bounds[index])
        self._open()
        record = os.pread(self._file, stop - start, start)
        self._check_version()  # after it was read: a file that was written over holds other records at these bounds
        try:
            return json.loads(record.decode())
        except UnicodeDecodeError as error:
            raise DataError(f"byte {start + error.start} of {self.path} is not UTF-8", self.name(index)) from error
        except (ValueError, RecursionError) as error:
            raise SourceChangedError(f"{self.path} changed while it was read: {error}", self.name(index)) from error

    def name(self, index: int) -> str:
        """The file's name and the number of the record, from 0: an id for one that has none."""
        return f"{Path(self.path).name}:{index}"

    def _open(self) -> None:
        with self._lock:
            if self._file >= 0:
                return
            try:
                self._file = os.open(self._plain, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"sources.path={self.path!r} cannot be read: {error.strerror or error}") from error
        self._check_version()

    def _check_version(self) -> None:
        """Of the file that is open: where another one has taken its name since, the old one is read to the end."""
        stat = os.fstat(self._file)
        if (stat.st_mtime_ns, stat.st_size) != self._version:
            raise SourceChangedError(f"{self.path} has changed since it was opened; start again")

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_file")}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._lock, self._file = threading.Lock(), -1

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)


def _suffixes(path: str) -> tuple[str, str]:
    """(.json or .jsonl, .gz or .zst or nothing) of a file's name, or DataError."""
    endings = [suffix.lower() for suffix in Path(path).suffixes]
    packed = endings.pop() if endings and endings[-1] in (".gz", ".zst") else ""
    if not endings or endings[-1] not in (".json", ".jsonl"):
        raise DataError(
            f"sources.path={path!r} is neither a .json array nor a .jsonl file of samples (either may be packed as .gz "
            "or .zst)"
        )
    return endings[-1], packed


def _unpacked(path: str) -> str:
    """The file itself, or its unpacked copy in the cache, made now if it is not there."""
    _, packed = _suffixes(path)
    if not packed:
        return path
    stat = os.stat(path)
    key = hashlib.sha256(f"{os.path.realpath(path)}\n{stat.st_mtime_ns}\n{stat.st_size}".encode()).hexdigest()[:16]
    copy = cache_root() / key / Path(path).stem
    if not copy.exists():
        try:
            with gzip.open(path) if packed == ".gz" else _open_zst(path) as stream:
                write_copy(stream, copy)
        except Exception as error:  # gzip, zlib and zstd have errors of their own
            raise DataError(f"sources.path={path!r} cannot be unpacked to {copy}: {error}") from error
    return str(copy)


def _open_zst(path: str) -> Any:
    import pyarrow  # slow to import; Python has a zstd of its own from 3.14 on alone

    return pyarrow.input_stream(path, compression="zstd")


@lru_cache(maxsize=8)
def _find_records(plain: str, modified: int, size: int, path: str) -> Int64[np.ndarray, "records 2"]:
    """Where records start and stop, in bytes; done once for as long as the file stays what it is."""
    del modified
    suffix, _ = _suffixes(path)
    if not size:
        raise DataError(f"{path} is empty")
    with open(plain, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        # As Latin-1 a byte is a character: offsets of the one are those of the other, and JSON's own signs are ASCII.
        text = str(data, "latin-1")
    if text.startswith(_BOMS_OF_UTF_16):
        raise DataError(f"{path} is UTF-16: write it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
    found = _array_bounds(text, path) if suffix == ".json" else _line_bounds(text, path)
    return np.array(list(found), np.int64).reshape(-1, 2)


def _array_bounds(text: str, path: str) -> Iterator[tuple[int, int]]:
    place = _skip_space(text, len(_BOM) if text.startswith(_BOM) else 0)
    if text[place : place + 1] != "[":
        raise _malformed(text, place, path, "an array '[' of samples is expected (one sample a line: name it .jsonl)")
    place = _skip_space(text, place + 1)
    if text[place : place + 1] == "]":
        return
    while True:
        stop = _parse(text, place, path)
        yield place, stop
        place = _skip_space(text, stop)
        sign = text[place : place + 1]
        if sign == "]":
            break
        if sign != ",":
            raise _malformed(text, place, path, "',' or ']' is expected after a sample")
        place = _skip_space(text, place + 1)
    if (rest := _skip_space(text, place + 1)) != len(text):
        raise _malformed(text, rest, path, "something follows the array")


def _line_bounds(text: str, path: str) -> Iterator[tuple[int, int]]:
    start = len(_BOM) if text.startswith(_BOM) else 0
    if text.startswith("[", first := _skip_space(text, start)):
        raise _malformed(
            text, first, path, "a line is one sample, an object {...} (an array of samples: name it .json)"
        )
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        place = _skip_space(text, start)
        if place < end:
            stop = _parse(text, place, path)
            if stop > end or (rest := _skip_space(text, stop)) < end:
                raise _malformed(text, min(stop, end) if stop > end else rest, path, "a line is one whole sample")
            yield place, stop
        start = end + 1


def _parse(text: str, place: int, path: str) -> int:
    """Where the value that starts at `place` ends."""
    try:
        return _DECODER.raw_decode(text, place)[1]
    except json.JSONDecodeError as error:
        raise _malformed(text, error.pos, path, error.msg) from error
    except (ValueError, RecursionError) as error:  # NaN; a number of 5,000 digits; ten thousand brackets
        raise _malformed(text, place, path, str(error) or "nested too deeply") from error


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _skip_space(text: str, place: int) -> int:
    return _SPACE.match(text, place).end()  # type: ignore[union-attr]


def _malformed(text: str, place: int, path: str, what: str) -> DataError:
    where = f"line {text.count(chr(10), 0, place) + 1}, byte {place}"
    cut = place >= len(text.rstrip()) or what.startswith("Unterminated string")
    return DataError(f"{path}, {where}{': the file is cut' if cut else ''}: {what}")
