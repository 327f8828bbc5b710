"""Where the images that samples name lie: in a folder, a zip or a tar, which are read where they are.

An archive is scanned once for where its members begin. From then on it is read by offset: any number of threads share
one open file, and another process is handed 50 bytes for each member, not the archive's own directory (which takes a
kilobyte for each, half a gigabyte for LLaVA's 558,000 pictures).
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from saisa_jax.data.sample import DataError

MAX_FILE = 2**30  # bytes; no image is larger
ENDINGS = (".jpg", ".png", ".gif", ".jpeg", ".webp", ".JPG", ".PNG", ".JPEG")  # tried for a missing image
ZIP_MAGIC = b"PK\x03\x04"
ZIP_HEADER = 30  # bytes of a member's own header in front of its name


def open_images(path: str | os.PathLike[str]) -> ImageFolder | Archive:
    """A folder, .zip or .tar of images.

    Raises:
      DataError: it is not there, or cannot be read.
    """
    place = Path(path)
    if place.is_dir():
        return ImageFolder(place)
    if not place.is_file():
        raise DataError(f"sources.images={str(path)!r} is neither a folder nor a .zip or .tar file here")
    if place.suffix.lower() in (".zip", ".tar"):
        return Archive(place)
    hint = "; unpack it first" if place.suffix.lower() in (".gz", ".tgz", ".bz2", ".xz", ".zst") else ""
    raise DataError(f"sources.images={str(path)!r} is neither a folder nor a .zip or .tar{hint}")


def checked_name(name: str, sample_id: str) -> str:
    """An image name as a relative path with forward slashes, without `.` parts.

    Raises:
      DataError: it is empty, absolute, has a drive letter, a backslash or `..`, or no file can be called so.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    drive = len(name) > 1 and name[1] == ":"
    if not parts or name.startswith("/") or drive or "\\" in name or ".." in parts or "\0" in name:
        flag = "; sources.allow_absolute=True takes absolute names as they are" if name.startswith("/") else ""
        raise DataError(
            f"image {name[:200]!r} is not a path within sources.images; expected folder/name.jpg with forward slashes, "
            f"not absolute, and without '..'{flag}",
            sample_id,
        )
    return "/".join(parts)


class ImageFolder:
    """A directory of images. Links in it may lead anywhere: whoever laid out the folder made them."""

    def __init__(self, root: Path) -> None:
        self.root = os.path.realpath(root)

    def find(self, name: str, sample_id: str) -> str:
        """The path of an image, which may not be there; DataError if the name itself leads out of the folder."""
        return os.path.join(self.root, checked_name(name, sample_id))


class Member(NamedTuple):
    """Where a file lies in an archive."""

    key: int  # of its name
    start: int  # of its data in a tar; of its header in a zip
    stored: int  # bytes in the archive
    size: int  # bytes of the file
    crc: int  # zip
    method: int  # zip: stored or deflated


_MEMBER = np.dtype([("key", "u8"), ("start", "i8"), ("stored", "i8"), ("size", "i8"), ("crc", "u4"), ("method", "i2")])


class Archive:
    """A .zip, or a .tar that is not compressed; safe to share among threads, small when pickled."""

    def __init__(self, path: Path) -> None:
        """Scans the archive; DataError if it is damaged or compressed as a whole."""
        self.path = str(path)
        stat = os.stat(path)
        self.version = (stat.st_mtime_ns, stat.st_size)
        self.example, self._keys, self._members = _scan(self.path, *self.version)
        self._lock, self._file = threading.Lock(), -1

    def find(self, name: str, sample_id: str) -> ArchivedImage:
        """An image of the archive, of which nothing is read yet; DataError if there is none of that name."""
        clean = checked_name(name, sample_id)
        place = self._place(clean)
        if place is None:
            stem = clean.rsplit(".", 1)[0]
            near = next((stem + ending for ending in ENDINGS if self._place(stem + ending) is not None), None)
            hint = f"{near!r} is there: is that what is meant?" if near else f"it holds, say, {self.example!r}"
            raise DataError(f"there is no image {clean!r} in {self.path} ({hint})", sample_id)
        return ArchivedImage(self, clean, place)

    def _place(self, name: str) -> int | None:
        """Where a member stands in the index; of two of one name the last."""
        key = _key(name)
        place = int(np.searchsorted(self._keys, np.uint64(key), side="right")) - 1
        return place if place >= 0 and self._keys[place] == key else None

    def read(self, place: int) -> bytes:
        """The file of that place in the index."""
        member = Member(*self._members[place].item())
        start = member.start
        if max(member.stored, member.size) > MAX_FILE:
            raise DataError(f"{self.path}: the member at byte {start} says that it has {member.size:,} bytes")
        if _is_zip(self.path):
            # The header's own name and extra field may be longer than the directory says.
            header = self._pread(ZIP_HEADER, start)
            if header[:4] != ZIP_MAGIC:
                raise DataError(f"{self.path}: no member starts at byte {start}; the archive is damaged or has changed")
            start += ZIP_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        data = self._pread(member.stored, start)
        if member.method == zipfile.ZIP_DEFLATED:
            try:
                # One byte more than there should be, so that a member that lies about its size is not unpacked whole.
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
            except zlib.error as error:
                raise DataError(f"{self.path}: the member at byte {member.start} is damaged: {error}") from error
        if len(data) != member.size or (member.crc and zlib.crc32(data) != member.crc):
            raise DataError(f"{self.path}: the member at byte {member.start} is damaged: its checksum does not match")
        return data

    def _pread(self, count: int, start: int) -> bytes:
        with self._lock:
            if self._file < 0:
                self._file = os.open(self.path, os.O_RDONLY)
        data = os.pread(self._file, count, start)
        if len(data) != count:
            raise DataError(f"{self.path} ends at byte {start + len(data)}, within a member: it is cut or has changed")
        return data

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_file")}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._lock, self._file = threading.Lock(), -1

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)


@dataclass(frozen=True)
class ArchivedImage:
    """A `StoredImage` in an archive."""

    archive: Archive
    member: str
    place: int

    @property
    def name(self) -> str:
        return f"{self.archive.path}/{self.member}"

    @property
    def version(self) -> tuple[int, int]:
        """Changes with the archive."""
        return self.archive.version

    def read(self) -> bytes:
        return self.archive.read(self.place)


def _key(name: str) -> int:
    """64 bits of a name: among a million names two are alike once in 40 million archives."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


@lru_cache(maxsize=8)
def _scan(path: str, modified: int, size: int) -> tuple[str, np.ndarray, np.ndarray]:
    """A member's name, all members' keys in order, and the members; done once while the file stays the same."""
    del modified, size
    example = ""

    def members() -> Iterator[Member]:
        nonlocal example
        for name, member in _zip_members(path) if _is_zip(path) else _tar_members(path):
            example = example or name
            yield member._replace(key=_key("/".join(part for part in name.split("/") if part not in ("", "."))))

    try:
        found = np.fromiter(members(), _MEMBER)
    except (tarfile.TarError, zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        hint = "" if _is_zip(path) else "; if it is compressed, unpack it or pack it as a .zip"
        raise DataError(f"sources.images: {path} cannot be read: {error}{hint}") from error
    if not len(found):
        raise DataError(f"sources.images: {path} holds no files")
    found.sort(order="key", kind="stable")
    return example, np.ascontiguousarray(found["key"]), found  # a search through a field would copy it each time


def _is_zip(path: str) -> bool:
    return path.lower().endswith(".zip")


def _zip_members(path: str) -> Iterator[tuple[str, Member]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{info.filename!r} is encrypted, or packed otherwise than stored or deflated")
            if not info.is_dir():
                sizes = (info.compress_size, info.file_size)
                yield info.filename, Member(0, info.header_offset, *sizes, info.CRC, info.compress_type)


def _tar_members(path: str) -> Iterator[tuple[str, Member]]:
    with tarfile.open(path, "r:") as archive:
        while (info := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
            if info.isreg() and not info.issparse():
                yield info.name, Member(0, info.offset_data, info.size, info.size, 0, zipfile.ZIP_STORED)
