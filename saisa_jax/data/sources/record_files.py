"""What ArrayRecord files hold, told from the checksums that they carry: no record is unpacked.

The format is Riegeli's (github.com/google/riegeli, doc/riegeli_records_file_format.md): chunks of records, each with a
header that has the hash of its data; every 64 KiB a block header interrupts whatever stands there.
"""

from __future__ import annotations

import hashlib
import os
import struct

BLOCK = 2**16
BLOCK_HEADER = 24
_CHUNK_HEADER = struct.Struct("<QQQQQ")  # its own hash, size and hash of the data, type and records, size when unpacked


def records_digest(path: str | os.PathLike[str]) -> str:
    """A hash of all that a file on this machine holds.

    It is made of the chunks' own hashes, 40 bytes for each; of the whole file, if that is not what it seems.
    """
    with open(path, "rb") as file:
        size, digest = os.fstat(file.fileno()).st_size, hashlib.sha256()
        place = 0
        while place < size:
            header = _read(file.fileno(), place, _CHUNK_HEADER.size)
            if len(header) < _CHUNK_HEADER.size:
                break
            _, length, _, kind_and_records, _ = _CHUNK_HEADER.unpack(header)
            digest.update(header)
            # Every record of a chunk has a place of its own, so that an empty chunk of many is as long as they are.
            places = _next_chunk(place + (kind_and_records >> 8))
            place = max(_after(place, _CHUNK_HEADER.size + length), places)
        if place == size and size:
            return digest.hexdigest()[:16]
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _read(file: int, place: int, length: int) -> bytes:
    """Bytes from a place on, without the block headers among them."""
    data = b""
    while len(data) < length:
        if place % BLOCK == 0:
            place += BLOCK_HEADER
        part = os.pread(file, min(length - len(data), BLOCK - place % BLOCK), place)
        if not part:
            break
        data, place = data + part, place + len(part)
    return data


def _after(place: int, length: int) -> int:
    """Where so many bytes end that start at a place, the block headers between them counted."""
    usable = BLOCK - BLOCK_HEADER
    within = max(0, place % BLOCK - BLOCK_HEADER)  # bytes of the block before the place, without its header
    blocks, rest = divmod(within + length, usable)
    if not rest:  # it ends with a block, not with the header of the next one
        return place - place % BLOCK + blocks * BLOCK
    return place - place % BLOCK + blocks * BLOCK + BLOCK_HEADER + rest


def _next_chunk(place: int) -> int:
    """The first place from this one on at which a chunk may start: not within a block header."""
    return place if place % BLOCK == 0 or place % BLOCK >= BLOCK_HEADER else place - place % BLOCK + BLOCK_HEADER
