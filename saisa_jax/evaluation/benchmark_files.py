"""Where a benchmark's files lie below --data, in one of two forms: LLaVA's `playground/data/eval`, or Parquet files of
the Hugging Face Hub with the pictures inside."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from etils import epath

from saisa_jax.config import ConfigError
from saisa_jax.data.parquet import ParquetTable, find_files, split_of
from saisa_jax.data.sample import DataError
from saisa_jax.evaluation.tasks.task import TaskData


@dataclass(frozen=True)
class BenchmarkFiles:
    """What a benchmark's files are called.

    Attributes:
      folders: names of its folder below --data; capitals, - and _ do not count.
      hub: the repository on the Hub that has them as Parquet; "": none.
      splits: its splits that can be asked, the best first.
      questions: the file of questions in LLaVA's form, from the folder on; "": it has none.
      source: where the files in LLaVA's form come from.
    """

    folders: tuple[str, ...]
    hub: str = ""
    splits: tuple[str, ...] = ("test",)
    questions: tuple[str, ...] = ()
    source: str = "LLaVA's eval.zip (docs/Evaluation.md of LLaVA)"

    def find(self, data: TaskData) -> Place:
        """The benchmark's folder: `data` itself, or the one of its name in it.

        Raises:
          ConfigError: no --data.
          DataError: no such folder, or neither form is in it; the message says what to download and where it goes.
        """
        if not data.data:
            raise ConfigError(f"{data.task} needs --data=DIR: {self._wanted('DIR/' + self.folders[0])}")
        root = epath.Path(data.data)
        if not root.exists():
            raise DataError(f"--data={data.data}: there is no such file or folder")
        for folder in self._candidates(root):
            place = Place(self, folder, data)
            if place.questions or place.has_parquet:
                return place
        wanted = self._wanted(os.fspath(root / self.folders[0]))
        raise DataError(f"--data={data.data} holds no files of {data.task}: {wanted}")

    def _candidates(self, root: epath.Path) -> Iterator[epath.Path]:
        if not root.is_dir():
            yield root
            return
        names = [_plain(name) for name in (*self.folders, self.hub.rpartition("/")[2]) if name]
        below = sorted(entry for entry in root.iterdir() if _plain(entry.name) in names and entry.is_dir())
        yield from sorted(below, key=lambda entry: names.index(_plain(entry.name)))
        others = any(entry.is_dir() and not entry.name.startswith(".") for entry in root.iterdir())
        # The folder may be the benchmark's own; one of several benchmarks has no Parquet files beside them.
        own = _plain(root.name) in names or any(entry.name.endswith((".parquet", ".tsv")) for entry in root.iterdir())
        if own or not others or any((root / name).exists() for name in self.questions):
            yield root

    def _wanted(self, folder: str) -> str:
        ways = []
        if self.hub:
            ways.append(f"`hf download {self.hub} --repo-type dataset --local-dir {folder}` (Parquet)")
        if self.questions:
            ways.append(f"{self.source}, so that {folder}/{self.questions[0]} is there")
        return "put them there with " + ", or from ".join(ways)


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


@dataclass(frozen=True)
class Place:
    """A benchmark's folder (or a Parquet file in its place)."""

    files: BenchmarkFiles
    folder: epath.Path
    data: TaskData

    @cached_property
    def questions(self) -> epath.Path | None:
        """LLaVA's file of questions, if it is there; then that form is read."""
        paths = (self.folder / name for name in self.files.questions)
        return next((path for path in paths if path.exists()), None)

    @cached_property
    def has_parquet(self) -> bool:
        return self.folder.suffix == ".parquet" or (self.folder.is_dir() and _any_parquet(self.folder))

    def file(self, *names: str) -> epath.Path:
        """A file that must be there, under one of several names."""
        paths = [self.folder / name for name in names]
        for path in paths:
            if path.exists():
                return path
        raise DataError(
            f"{paths[0]} is missing, without which {self.data.task} cannot be asked; it comes with {self.files.source}"
        )

    def picture(self, *parts: str) -> str:
        """A picture's path: in --images if that is named, else below the benchmark's folder."""
        root = epath.Path(self.data.images) if self.data.images else self.folder.joinpath(*parts[:-1])
        return os.fspath(root / parts[-1])

    def table(self, columns: Sequence[str], under: str = "", splits: Sequence[str] = ()) -> ParquetTable:
        """The Parquet files of the first split that is there. `columns` with a "?" behind them may be missing.

        Raises:
          DataError: another split alone, a shard that is missing or cut, a column that is not there.
        """
        splits = splits or self.files.splits
        folder = self.folder
        if under and folder.is_dir():
            below = [entry for entry in folder.iterdir() if _plain(entry.name) == _plain(under) and entry.is_dir()]
            folder = below[0] if below else folder
        path = os.fspath(folder)
        there = [""]
        if folder.is_dir():
            there = sorted({split_of(os.fspath(file)) for file in _parquet_below(folder)})
        split = next((split for split in splits if split in there), None)
        if split is None and there != [""]:
            raise DataError(
                f"{path} holds {', '.join(filter(None, there))} of {self.data.task}, and none of the splits that are "
                f"asked: {', '.join(splits)}; hf download {self.files.hub} brings them"
            )
        names = find_columns(path, split)
        wanted = [name.rstrip("?") for name in columns if not name.endswith("?") or name[:-1] in names]
        missing = [name for name in wanted if name not in names]
        if missing:
            raise DataError(
                f"{path} has no column {', '.join(missing)}, which {self.data.task} needs"
                f"{' to score answers' if 'answer' in missing[0] else ''}; it has {', '.join(names)}"
            )
        return ParquetTable(path, split=split, columns=wanted)


def find_columns(path: str, split: str | None) -> tuple[str, ...]:
    return ParquetTable(find_files(path, split)[1][0]).columns


def _any_parquet(folder: epath.Path) -> bool:
    return next(_parquet_below(folder), None) is not None


def _parquet_below(folder: epath.Path) -> Iterator[epath.Path]:
    for entry in folder.iterdir():
        if entry.name.endswith(".parquet"):
            yield entry
        elif not entry.name.startswith(".") and not entry.suffix and entry.is_dir():
            yield from _parquet_below(entry)


# --- Files of text ---------------------------------------------------------------------------------------------------


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file. DataError, with the line's number, for one that is none."""
    rows = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if line.strip():
            rows.append(_parsed(line, f"{path}, line {number}"))
            if not isinstance(rows[-1], dict):
                raise DataError(f"{path}, line {number}: {line[:80]!r} is no object")
    return rows


def read_json(path: epath.Path) -> Any:
    return _parsed(_text(path), os.fspath(path))


def read_table(path: epath.Path, delimiter: str = "\t") -> list[dict[str, str | None]]:
    """The rows of a .tsv or .csv file with a head; an empty cell is None."""
    csv.field_size_limit(2**30)  # MMBench's pictures are cells
    rows = list(csv.DictReader(io.StringIO(_text(path)), delimiter=delimiter))
    if not rows:
        raise DataError(f"{path} has no rows")
    return [{key: value or None for key, value in row.items() if key is not None} for row in rows]


def _text(path: epath.Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: no JSON, or cut: {error}") from error


def need(row: dict[str, Any], key: str, where: epath.Path) -> Any:
    """A field of a row; DataError if it is not there."""
    if key not in row:
        raise DataError(f"{where}: a row has no {key!r}; it has {', '.join(row)[:200]}")
    return row[key]
