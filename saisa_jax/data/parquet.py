"""Parquet files with pictures inside, as data sets on the Hugging Face Hub come: rows at random, pictures when read.

    table = ParquetTable("data/POPE", split="test", columns=("question", "answer", "image"))
    table[7]                            {"question": "Is there ...?", "answer": "yes", "image": ParquetImage(...)}
    table[7]["image"].read()            the encoded file
    table.share(host, hosts)            the rows of one host: whole row groups

A picture is a struct of its bytes and a path, or bytes alone, or a list of those. Files are read by row group, the
smallest part that Parquet unpacks: the last groups stay in memory, text and pictures apart, so that a row's words cost
no pictures. Length and groups are in the files' footers.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import sys
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from saisa_jax import buckets
from saisa_jax.data.sample import DataError, SourceChangedError
from saisa_jax.errors import did_you_mean

OPEN_FILES = 16  # of one table
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(-[0-9a-f]+)?")
_SPLITS = ("train", "validation", "val", "dev", "test", "testdev")
_MAGIC = re.compile(r"[*?\[]")


class ParquetTable:
    """The rows of one or several files of the same columns; safe to share among threads, small when pickled."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        split: str | None = None,
        columns: Sequence[str] | None = None,
        cache_bytes: int = 2**28,
    ) -> None:
        """Reads the footers.

        Args:
          path: a file, a folder (with all folders in it), or a pattern of names ("data/train-*.parquet"); on a disk or
            in a bucket (gs://).
          split: of a folder, the files of that split: named train-00000-of-00012.parquet, train.parquet or train/*.
          columns: those that are read; None: all that every file has.
          cache_bytes: bounds the unpacked groups that are kept; the last one always is.

        Raises:
          DataError: nothing there, no such split or several and none chosen, a shard missing, a file that is cut or no
            Parquet, a column that is not there, or no rows.
        """
        self.path, self.cache_bytes = os.fspath(path), cache_bytes
        self.root, found = find_files(self.path, split)  # the folder of all files, with a slash
        self.files, schemas = zip(*map(_describe, found), strict=True)
        if not any(file.rows for file in self.files):
            raise DataError(f"{self.path} is empty: no rows in {_listed([file.path for file in self.files])}")
        schema = schemas[0]
        common = [name for name in schema.names if all(name in its.names for its in schemas)]
        self.columns = tuple(common if columns is None else columns)
        for file, its in zip(self.files, schemas, strict=True):
            for name in self.columns:
                if name not in its.names:
                    hint = did_you_mean(name, its.names)
                    raise DataError(f"{file.path} has no column {name!r}{hint}; it has {_listed(its.names)}")
        self.names = [name for column in schema if column.name in self.columns for name in _inner(column)]
        features = _features(schema)
        self.image_columns = tuple(name for name in self.columns if _holds_images(schema.field(name), features))
        self.labels = {
            name: tuple(feature["names"])
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
        self._ends = np.cumsum([file.rows for file in self.files])
        self._start_up()

    def select(self, columns: Sequence[str]) -> ParquetTable:
        """The same rows, of which these columns are read; all of them are columns of this table."""
        other = copy.copy(self)
        other.columns = tuple(columns)
        other.image_columns = tuple(name for name in columns if name in self.image_columns)
        return other

    def _start_up(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int, str], pa.Table] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row's columns as Python values, pictures as `ParquetImage` that are not read yet; DataError if damaged."""
        index = range(len(self))[index]
        try:
            values = self._values(index, "")
        except DataError as error:
            raise DataError(error.reason, self.name(index)) from error
        for name in self.image_columns:
            if isinstance(cell := values[name], list):
                values[name] = [ParquetImage(self.name(index), name, at, index, self) for at in range(len(cell))]
            elif cell is not None:
                values[name] = ParquetImage(self.name(index), name, None, index, self)
        return values

    def image_bytes(self, index: int, column: str, place: int | None = None) -> bytes:
        """The encoded file of a picture; `place` within the cell's list. DataError if there is none."""
        cell = self._values(index, column)[column]
        if place is not None:
            cell = cell[place] if cell and place < len(cell) else None  # a damaged file may hold fewer than it says
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not data:
            path = cell.get("path") if isinstance(cell, dict) else None
            hint = f", and names {path!r}: pictures beside the file are not read" if path else ""
            raise DataError(f"column {column!r} has no bytes{hint}")
        return data

    def column(self, name: str) -> list[Any]:
        """One column of all rows, read once: ids, or what another table is joined by. Not for pictures."""
        ends = [(number, group) for number, file in enumerate(self.files) for group in range(len(file.ends))]
        return [value for number, group in ends for value in self._read(number, group, [name])[name].to_pylist()]

    def name(self, index: int) -> str:
        """The file, below the folder of all files, and the row in it, from 0: an id for a row that has none."""
        number, row = self.place(index)
        return f"{self.files[number].path.removeprefix(self.root)}:{row}"

    def share(self, host: int, hosts: int) -> range:
        """The rows of one of several hosts: all have about as many, and a row group is read by one of them alone.

        Where there are fewer groups than hosts, some hosts have no rows.
        """
        starts = [0]
        for file, end in zip(self.files, self._ends.tolist(), strict=True):
            starts += [end - file.rows + group_end for group_end in file.ends]
        bounds = [min(starts, key=lambda start: abs(start - len(self) * number / hosts)) for number in (host, host + 1)]
        return range(*bounds)

    @property
    def version(self) -> tuple[tuple[str, int, int], ...]:
        """Names, sizes and times of the files: changes when one of them is replaced."""
        return tuple((file.path.removeprefix(self.root), file.bytes, file.modified) for file in self.files)

    def content(self) -> str:
        """A hash of all that the columns say, of pictures their number and paths: of the columns as they are packed."""
        digest = hashlib.sha256(repr(self.columns).encode())
        for number, file in enumerate(self.files):
            metadata = self._file(number).parquet.metadata
            with buckets.place(file.path).open("rb") as stream:
                for group in range(metadata.num_row_groups):
                    for column in map(metadata.row_group(group).column, range(metadata.num_columns)):
                        name = column.path_in_schema.split(".")[0]
                        if name not in self.columns:
                            continue
                        digest.update(f"{column.path_in_schema} {column.num_values}\n".encode())
                        if name not in self.image_columns or column.path_in_schema.endswith(".path"):
                            start = column.dictionary_page_offset or column.data_page_offset
                            stream.seek(start)
                            digest.update(stream.read(column.total_compressed_size))
        return f"parquet:{digest.hexdigest()[:16]}"

    # --- Groups ------------------------------------------------------------------------------------------------------

    def place(self, index: int) -> tuple[int, int]:
        """A row's file, by number, and its place in it."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - int(self._ends[number] - self.files[number].rows)

    def _values(self, index: int, column: str) -> dict[str, Any]:
        """The row in the group that `_group` finds for the column."""
        number, row = self.place(range(len(self))[index])
        ends = self.files[number].ends
        group = int(np.searchsorted(ends, row, side="right"))
        found = self._group(number, group, column)
        try:
            return found.slice(row - (ends[group - 1] if group else 0), 1).to_pylist()[0]
        except (ValueError, pa.ArrowException) as error:  # text that is not UTF-8
            raise DataError(f"{self.files[number].path}: row {row} cannot be read: {error}") from error

    def _group(self, number: int, group: int, column: str) -> pa.Table:
        """A row group, of the cache or read now: a column of pictures, or ("") all that says no picture's bytes."""
        key = number, group, column
        if (found := self._cached(key)) is not None:
            return found
        with self._file(number).lock:  # of several threads that want it one reads it
            if (found := self._cached(key)) is None:
                found = self._read(number, group, [column] if column else self._without_bytes(number))
                with self._lock:
                    self._groups[key] = found
                    held = sum(table.nbytes for table in self._groups.values())
                    while held > self.cache_bytes and len(self._groups) > 1:
                        held -= self._groups.popitem(last=False)[1].nbytes
        return found

    def _cached(self, key: tuple[int, int, str]) -> pa.Table | None:
        with self._lock:
            if key in self._groups:
                self._groups.move_to_end(key)
            return self._groups.get(key)

    def _without_bytes(self, number: int) -> list[str]:
        """What is read for a row's values: of a picture its path, by which one sees that there is a picture."""
        leaves = self.files[number].leaves
        wanted: list[str] = []
        for name in self.columns:
            paths = [leaf for leaf in leaves if leaf.startswith(f"{name}.") and leaf.endswith(".path")]
            wanted += paths if paths and name in self.image_columns else [name]
        return wanted

    def _read(self, number: int, group: int, columns: list[str]) -> pa.Table:
        file = self._file(number)
        try:
            with file.lock:
                found = file.parquet.read_row_group(group, columns=columns)
            ends = (0, *self.files[number].ends)
            if found.num_rows != ends[group + 1] - ends[group]:
                raise ValueError(f"it has {found.num_rows} rows, and not {ends[group + 1] - ends[group]}")
            return found
        except Exception as error:  # pyarrow's own, OSError, and those of a bucket's client
            path = self.files[number].path
            raise DataError(f"{path}: row group {group} cannot be read: {error}; is the file damaged?") from error

    def _file(self, number: int) -> _OpenFile:
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
            file = self.files[number]
            opened, stat = _open(file.path)
            if (stat.length, int(stat.mtime)) != (file.bytes, file.modified):
                raise SourceChangedError(f"{file.path} has changed since it was opened; start again")
            self._open[number] = _OpenFile(opened)
            while len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)  # closed when the last thread is done with it
            return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_open", "_groups")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start_up()


@dataclass(frozen=True)
class ParquetImage:
    """A `StoredImage` in a table."""

    row: str  # the row's name
    column: str
    place: int | None  # in the cell's list; None: the cell is one picture
    index: int = field(compare=False)
    table: ParquetTable = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        place = "" if self.place is None else f"[{self.place}]"
        return f"{self.table.root}{self.row}/{self.column}{place}"

    @property
    def version(self) -> tuple[int, int]:
        """Changes with the file."""
        file = self.table.files[self.table.place(self.index)[0]]
        return file.bytes, file.modified

    def read(self) -> bytes:
        return self.table.image_bytes(self.index, self.column, self.place)


@dataclass
class _OpenFile:
    parquet: pq.ParquetFile
    lock: threading.RLock = field(default_factory=threading.RLock)  # pyarrow's readers are not for two threads


# --- Files -----------------------------------------------------------------------------------------------------------


class File(NamedTuple):
    """What a footer says."""

    path: str
    bytes: int
    modified: int  # seconds
    ends: tuple[int, ...]  # of the row groups: the row after the last one
    leaves: tuple[str, ...]  # the columns as the file stores them: "images.list.element.bytes"

    @property
    def rows(self) -> int:
        return self.ends[-1] if self.ends else 0


def find_files(path: str, split: str | None = None) -> tuple[str, list[str]]:
    """The folder that all are in, with a slash, and the files in the order of their names; see `ParquetTable`."""
    place = buckets.place(path)
    if place.is_file():
        return path[: path.rfind("/") + 1], [path]
    if not place.is_dir():
        magic = _MAGIC.search(path)
        if magic is None or "**" in path:
            raise DataError(f"{path!r} is neither a file, a folder nor a pattern of names here")
        start = path.rfind("/", 0, magic.start()) + 1
        folder = epath.Path(path[:start] or ".")
        if not (found := sorted(os.fspath(name) for name in folder.glob(path[start:]))):
            raise DataError(f"no file matches {path!r}")
        return f"{os.fspath(folder)}/" if start else "", found
    root = f"{os.fspath(place)}/"
    found = sorted(_below(place))
    if not found:
        raise DataError(f"{path!r} holds no .parquet file")
    by_split = defaultdict(list)
    for name in found:
        by_split[split_of(name)].append(name)
    if split is None and len(by_split) > 1:
        raise DataError(f"{path} holds several splits: {_listed(name for name in by_split if name)}; choose one")
    if split is not None and set(by_split) != {""}:  # files without a split are all of it
        if split not in by_split:
            raise DataError(f"{path} has no split {split!r}; it has {_listed(name for name in by_split if name)}")
        found = by_split[split]
    _check_shards(found)
    return root, found


def _below(folder: epath.Path) -> Iterator[str]:
    """The Parquet files of a folder and its folders; `hf download` keeps notes in .cache."""
    for entry in folder.iterdir():
        if entry.name.endswith(".parquet"):
            yield os.fspath(entry)
        elif not entry.name.startswith(".") and entry.is_dir():
            yield from _below(entry)


def split_of(path: str) -> str:
    """The split that a name tells, "" if none: "train" of train-00000-of-00002.parquet and of train/0.parquet."""
    *_, folder, name = ["", *path.split("/")]
    stem = name.removesuffix(".parquet")
    if match := _SHARD.fullmatch(stem):
        return match["split"]
    return stem if stem in _SPLITS else folder if folder in _SPLITS else ""


def _check_shards(paths: Iterable[str]) -> None:
    """Raises DataError where a folder lacks one of the shards that the others' names tell of."""
    seen = defaultdict(set)
    for path in paths:
        folder, _, name = path.rpartition("/")
        if match := _SHARD.fullmatch(name.removesuffix(".parquet")):
            seen[folder, match["split"], int(match["total"])].add(int(match["number"]))
    for (folder, split, total), numbers in seen.items():
        if missing := sorted(set(range(total)) - numbers):
            name = f"{split}-{missing[0]:05d}-of-{total:05d}"
            raise DataError(
                f"{folder}: {len(missing)} of {total} shards are missing, the first is {name}.parquet; copy them, or "
                f"name those that are there by a pattern: {folder}/{split}-*.parquet"
            )


def _open(path: str) -> tuple[pq.ParquetFile, Any]:
    place = buckets.place(path)
    try:
        stat = place.stat()
        remote = buckets.is_remote(path)
        source = place.open("rb") if remote else path
        return pq.ParquetFile(source, pre_buffer=remote, page_checksum_verification=True), stat
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file, or is cut: {_reason(place, error)}") from error
    except Exception as error:  # OSError, and those of a bucket's client
        raise DataError(f"{path} cannot be read: {error}") from error


def _reason(place: epath.Path, error: Exception) -> str:
    with place.open("rb") as file:
        head = file.read(40)
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, in place of the file; `hf download` and `git lfs pull` bring the file itself"
    return "it has 0 bytes" if not head else str(error)


def _describe(path: str) -> tuple[File, pa.Schema]:
    opened, stat = _open(path)
    with opened:
        try:
            groups = [opened.metadata.row_group(number).num_rows for number in range(opened.num_row_groups)]
            ends = tuple(np.cumsum(groups).tolist())
            leaves = tuple(
                sys.intern(opened.metadata.schema.column(i).path) for i in range(opened.metadata.num_columns)
            )
            return File(path, stat.length, int(stat.mtime), ends, leaves), opened.schema_arrow
        except Exception as error:
            raise DataError(f"{path} is damaged: {error}") from error


# --- Columns ---------------------------------------------------------------------------------------------------------


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What `datasets` wrote down about the columns, if it wrote the file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return features if isinstance(features, dict) else {}
    except (KeyError, TypeError, ValueError):
        return {}


def _holds_images(column: pa.Field, features: Mapping[str, Any]) -> bool:
    """Whether a column is of pictures: so it is declared, or not declared and of their form."""
    kind = column.type
    while _is_list(kind):
        kind = kind.value_type
    stored = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    if not stored and not _is_binary(kind):
        return False
    declared = features.get(column.name)
    return declared is None or '"_type": "Image"' in json.dumps(declared)  # of a list, what it is a list of


def _inner(column: pa.Field) -> list[str]:
    """A column's name and, where it is a struct, what is in it: outer/inner."""
    kind = column.type
    while _is_list(kind):
        kind = kind.value_type
    below = [f"{column.name}/{name}" for part in kind for name in _inner(part)] if pa.types.is_struct(kind) else []
    return [column.name, *below]


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _listed(names: Iterable[str], most: int = 40) -> str:
    """Names with commas between them."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
