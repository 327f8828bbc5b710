"""Samples as ArrayRecord files: what `data prepare` writes, and the source that reads it.

    DIR/counts.npz                            tokens and images of every sample
    DIR/index.json                            the files; written last
    DIR/shard-00000-of-00016.arrayrecord      records of samples: ids, turns, and the images as encoded files, or what
                                              a frozen encoder made of them (`--features`)
    DIR/report.jsonl                          what was left out: {"id", "reason"} a line

A directory without index.json is not finished. ArrayRecord knows local files alone (it waits for ever for a gs:// one),
so that a shard in a bucket is copied to the local cache (`cache.py`): those of the block that is read, then those of
the next one, and others go when their room is needed.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from absl import logging
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from jaxtyping import Int64, Integer

from saisa_jax import buckets
from saisa_jax.compilation import cache_root
from saisa_jax.config import SourceConfig
from saisa_jax.data.features import FeatureSpec
from saisa_jax.data.sample import DataError, Sample, SourceChangedError, Turn
from saisa_jax.data.sources import SOURCES
from saisa_jax.data.sources.cache import copy_once, is_copy, make_room, room_for_copies
from saisa_jax.data.sources.record_files import records_digest

FORMAT = 2  # of records and index; raised when older programs could not read them. In the first, index.json had counts
FEATURES = 3  # of those that hold features
INDEX, COUNTS = "index.json", "counts.npz"
SUFFIX = ".arrayrecord"
COPIERS = 8  # shards that are copied at the same time


@dataclass(frozen=True)
class Shard:
    """One file of a prepared set."""

    name: str
    samples: int
    bytes: int


@dataclass(frozen=True)
class Index:
    """What index.json and counts.npz say."""

    shards: tuple[Shard, ...]
    fingerprint: str  # of what the tokens were counted with
    plan: dict[str, Any]  # what was asked for
    tokens: Integer[np.ndarray, " n"]
    images: Integer[np.ndarray, " n"]
    contents: tuple[str, ...] = ()  # `records_digest` of each file; sets of earlier versions say none
    version: str = field(default="", compare=False)  # of what was read, and from where

    def write(self, directory: epath.Path) -> None:
        """Writes both files, index.json last."""
        counts = io.BytesIO()
        small = lambda count: count.astype(np.min_scalar_type(count.max(initial=0)))  # noqa: E731
        np.savez(counts, tokens=small(self.tokens), images=small(self.images))
        (directory / COUNTS).write_bytes(counts.getvalue())
        document = {
            "format": FEATURES if FeatureSpec.of_plan(self.plan) else FORMAT,
            "shards": [asdict(shard) for shard in self.shards],
            "fingerprint": self.fingerprint,
            "plan": self.plan,
            "counts": hashlib.sha256(counts.getvalue()).hexdigest(),
            "contents": list(self.contents),
        }
        buckets.write_text(directory / INDEX, json.dumps(document))

    @classmethod
    def read(cls, directory: epath.Path) -> Index:
        """The index of a prepared set.

        Raises:
          DataError: there is none, or it is not one of this version.
        """
        path = directory / INDEX
        try:
            text = path.read_text()
            document = json.loads(text)
        except FileNotFoundError as error:
            raise DataError(
                f"there is no {path}: it is written last, so that nothing was prepared here or not to the end; "
                "start `data prepare` again, it goes on where it was"
            ) from error
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        seen = document.get("format") if isinstance(document, dict) else None
        if seen not in (1, FORMAT, FEATURES):
            raise DataError(f"{path} is of format {seen}, and this version reads {FEATURES}; run `data prepare` again")
        try:
            shards = tuple(Shard(**shard) for shard in document["shards"])
            counts = _read_counts(directory, document)
            contents = tuple(map(str, document.get("contents", ())))
            version = hashlib.sha256(f"{directory}\n{text}".encode()).hexdigest()[:16]
            index = cls(shards, document["fingerprint"], document["plan"], **counts, contents=contents, version=version)
        except (KeyError, TypeError, ValueError, OSError) as error:
            if isinstance(error, DataError):  # a ValueError, too
                raise
            raise DataError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        if sum(shard.samples for shard in shards) != len(index.tokens) or len(index.tokens) != len(index.images):
            raise DataError(
                f"{path} is damaged: it counts {len(index.tokens)} samples, and its files hold another number"
            )
        return index


def _read_counts(directory: epath.Path, document: Any) -> dict[str, Integer[np.ndarray, " n"]]:
    if document["format"] == 1:
        return {name: np.array(document[name], np.int32) for name in ("tokens", "images")}
    content = (directory / COUNTS).read_bytes()
    if hashlib.sha256(content).hexdigest() != document["counts"]:
        raise DataError(
            f"{directory / COUNTS} is not the one that {INDEX} was written with: copy both again, or delete {INDEX} "
            "and run `data prepare` again"
        )
    with np.load(io.BytesIO(content)) as stored:
        return {name: stored[name] for name in ("tokens", "images")}


@SOURCES.register("arrayrecord")
class ShardedSamples:
    """The samples of a prepared directory; safe to share among threads. Pickled it is its path, and opens again."""

    def __init__(self, config: SourceConfig) -> None:
        """Reads the index.

        Raises:
          DataError: the directory is not finished, or a file of it is missing or has another size.
        """
        self.config = config
        self.directory = buckets.place(config.path)
        self.contents = Index.read(self.directory)
        self.features = FeatureSpec.of_plan(self.contents.plan)
        self.copied = buckets.is_remote(self.directory)
        self.pieces = np.cumsum([shard.samples for shard in self.contents.shards])
        self._readers: list[ArrayRecordDataSource | None] = [None] * len(self.contents.shards)
        self._opened: dict[int, tuple[str, os.stat_result]] = {}  # what the open files were then
        self._locks = [threading.Lock() for _ in self.contents.shards]
        self._room: int | None = None  # `data.cache_bytes`
        self._keep: frozenset[Path] = frozenset()  # the copies of what is read now and next
        self._ahead: collections.deque[int] = collections.deque()  # shards that are copied before they are read
        sizes = buckets.sizes(self.directory)
        for shard in self.contents.shards:
            size = sizes.get(shard.name)
            if size != shard.bytes:
                path, seen = self.directory / shard.name, "is missing"
                if size is not None:
                    seen = f"has {size:,} bytes, not {shard.bytes:,}"
                raise DataError(f"{path} {seen}; copy it again, or delete {INDEX} and run `data prepare` again")

    def __len__(self) -> int:
        return len(self.contents.tokens)

    def __getitem__(self, index: int) -> Sample:
        """Raises DataError if the record is damaged."""
        index = range(len(self))[index]
        number = int(np.searchsorted(self.pieces, index, side="right"))
        shard = self.contents.shards[number]
        place = index - int(self.pieces[number]) + shard.samples
        try:
            record = self._reader(number)[place]
            self._check_version(number)
            return decode_record(record, self.features)
        except (RuntimeError, OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):  # a ValueError, too
                raise
            self._check_version(number)
            raise DataError(f"cannot be read: {error}", f"{self.directory / shard.name}:{place}") from error

    def counts(self, fingerprint: str) -> tuple[Integer[np.ndarray, " n"], Integer[np.ndarray, " n"]] | None:
        """Text tokens and images of every sample, if they were counted with that template and tokenizer."""
        same = self.contents.fingerprint == fingerprint
        return (self.contents.tokens, self.contents.images) if same else None

    def content(self) -> str:
        """A hash of all records, wherever they lie; what `data prepare` wrote down, or of files changed since, theirs.

        A set of an earlier version that lies in a bucket tells lengths, and what its plan says of the data.
        """
        index, digests = self.contents, []
        written = None if self.copied else os.stat(self.directory / INDEX).st_mtime_ns
        for number, shard in enumerate(index.shards):
            path = self.directory / shard.name
            if written is not None and (not index.contents or os.stat(path).st_mtime_ns > written):
                digests.append(records_digest(path))
            elif index.contents:
                digests.append(index.contents[number])
        if digests:
            return f"records:{hashlib.sha256(repr(digests).encode()).hexdigest()[:16]}"
        lengths = [index.tokens.tolist(), index.images.tolist(), index.plan.get("marks")]
        return f"index:{hashlib.sha256(repr(lengths).encode()).hexdigest()[:16]}"

    def _reader(self, number: int) -> ArrayRecordDataSource:
        with self._locks[number]:
            reader = self._readers[number]
            if reader is None:
                shard = self.contents.shards[number]
                local = str(self._local(shard))
                self._opened[number] = local, os.stat(local)
                reader = ArrayRecordDataSource(local)
                if len(reader) != shard.samples:
                    raise ValueError(f"it holds {len(reader)} records, and {INDEX} says {shard.samples}")
                self._readers[number] = reader
        return reader

    def _check_version(self, number: int) -> None:
        """Raises SourceChangedError where a file was written over since it was opened.

        One whose name another file has taken, or none, is read to the end: it is still there while it is open.
        """
        path, opened = self._opened.get(number, ("", None))
        with contextlib.suppress(FileNotFoundError):
            now = os.stat(path) if opened else None
            if opened and now and opened.st_ino == now.st_ino and _version(opened) != _version(now):
                raise SourceChangedError(f"{path} has changed since it was opened; start again")

    def expect(self, now: Int64[np.ndarray, " n"], then: Int64[np.ndarray, " m"], room: int | None) -> None:
        """Closes the shards that are no longer read; copies those that are, in the order of their first samples.

        Args:
          now: the samples that are read now, in their order.
          then: likewise, what follows.
          room: `data.cache_bytes`.

        Raises:
          DataError: the shards of `now` have no room.
        """
        wanted = [self._shards_of(numbers) for numbers in (now, then)]
        kept = {*wanted[0], *wanted[1]}
        for number in [number for number in list(self._opened) if number not in kept]:
            self._readers[number] = None
            self._opened.pop(number, None)
        if not self.copied:
            return
        shards, bound = self.contents.shards, room_for_copies(room, SUFFIX)
        size = sum(shards[number].bytes for number in wanted[0])
        if size > bound:
            raise DataError(
                f"{self.directory}: the shards of one block of the order have {size:,} bytes, and their copies in "
                f"{cache_root()} room for {bound:,} (--config.data.cache_bytes): raise it, or lower "
                "--config.data.shuffle_block_size"
            )
        self._room, self._keep = room, frozenset(self._copy_of(shards[number]) for number in kept)
        self._ahead = collections.deque(dict.fromkeys([*wanted[0], *wanted[1]]))
        for _ in range(min(COPIERS, len(self._ahead))):
            threading.Thread(target=self._copy_ahead, daemon=True).start()

    def _shards_of(self, numbers: Int64[np.ndarray, " n"]) -> list[int]:
        found, first = np.unique(np.searchsorted(self.pieces, numbers, side="right"), return_index=True)
        return found[np.argsort(first)].tolist()

    def _copy_ahead(self) -> None:
        """Copies one shard after the other, until there is no other one or no room."""
        with contextlib.suppress(IndexError):
            while True:
                number = self._ahead.popleft()
                try:
                    with self._locks[number]:
                        if self._local(self.contents.shards[number], ahead=True) is None:
                            return
                except Exception as error:  # its reader will meet it again, and say which sample it needs
                    logging.warning("%s was not copied: %s", self.directory / self.contents.shards[number].name, error)

    def _copy_of(self, shard: Shard) -> Path:
        return cache_root() / self.contents.version / shard.name

    def _local(self, shard: Shard, ahead: bool = False) -> str | None:
        """The path of a shard on this machine: itself, or its copy in the cache, made now if it is not there.

        Args:
          shard: of this set.
          ahead: it is not needed yet; None is returned where copies that are needed would have to go for it.
        """
        path = self.directory / shard.name
        if not self.copied:
            return os.fspath(path)
        copy = self._copy_of(shard)
        if not is_copy(copy, shard.bytes):
            if not make_room(copy, shard.bytes, self._room, SUFFIX, self._keep, force=not ahead) and ahead:
                return None
            copy_once(lambda: path.open("rb"), copy, shard.bytes)
        elif not ahead:
            os.utime(copy)  # it goes later than those that are not opened
        return str(copy)

    def __reduce__(self) -> tuple[type, tuple[SourceConfig]]:
        return type(self), (self.config,)


def _version(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_mtime_ns, stat.st_size


# --- Records ---------------------------------------------------------------------------------------------------------


def encode_record(sample: Sample, images: Sequence[bytes]) -> bytes:
    """A sample with the encoded files of its images, or their features, as the bytes of one record."""
    record = {
        "id": sample.id,
        "system": sample.system,
        "independent": sample.independent_turns,
        # An older program reads records of two fields a turn, and refuses those of three.
        "turns": [(turn.role, turn.text) if turn.loss else (turn.role, turn.text, False) for turn in sample.turns],
        "images": list(images),
    }
    return msgpack.Packer().pack(record)


def decode_record(record: bytes, features: FeatureSpec | None = None) -> Sample:
    """The sample of a record, its images as bytes, or as `features`. Raises ValueError, KeyError or TypeError if it is
    none."""
    fields = msgpack.unpackb(record)
    images = tuple(fields["images"])
    return Sample(
        id=fields["id"],
        turns=tuple(Turn(*turn) for turn in fields["turns"]),
        images=tuple(map(features.array, images)) if features else images,
        independent_turns=fields["independent"],
        system=fields["system"],
    )


# --- Files -----------------------------------------------------------------------------------------------------------


def write_shard(path: epath.Path, records: Iterable[bytes]) -> tuple[int, str]:
    """Writes records to a file that is not there before it is whole; returns its bytes and `records_digest`."""
    remote = buckets.is_remote(path)
    folder = tempfile.mkdtemp(prefix="saisa_jax-") if remote else os.fspath(path.parent)
    part = Path(folder) / f"{path.name}.part"
    try:
        # Groups of one record: reading one record then unpacks no others.
        writer = ArrayRecordWriter(str(part), "group_size:1,zstd:1")
        try:
            for record in records:
                writer.write(record)
        finally:
            writer.close()
        size, digest = part.stat().st_size, records_digest(part)
        if remote:
            buckets.copy_file(part, path)
        else:
            os.replace(part, path)
        return size, digest
    finally:
        part.unlink(missing_ok=True)
        if remote:
            shutil.rmtree(folder, ignore_errors=True)
