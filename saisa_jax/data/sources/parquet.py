"""Conversations in Parquet files, as the Hub's sets for visual instruction tuning come.

    texts          [{"user", "assistant"}], images [picture]       the Cauldron, FineVision, Docmatix
    conversations  [{"from", "value"}], image                      LLaVA-OneVision, and LLaVA's own form (llava.py)
    messages       [{"role", "content"}], images [picture]         chat messages; parts show the pictures by place
    anything else  sources.turns="{question} => {answer}"          its columns by name

`sources.turns` names the column, or is a template; which form a column has, its first turn says. A column of text holds
the same as JSON. Pictures are in the file, those of `sources.image_feature`, and are read when they are needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from absl import logging

from saisa_jax.config import SourceConfig
from saisa_jax.data.parquet import ParquetImage, ParquetTable
from saisa_jax.data.sample import ASSISTANT, USER, DataError, ImageSource, Sample, Turn
from saisa_jax.data.sources import SOURCES
from saisa_jax.data.sources.archives import open_images
from saisa_jax.data.sources.llava import FORMS, SYSTEMS, make_sample
from saisa_jax.data.sources.pictures import check_unread, find_picture
from saisa_jax.data.sources.turns import TurnsTemplate, as_text, check_name, entries

TURNS = ("texts", "conversations", "messages")  # columns that are looked for
IMAGES = ("image", "images")


@SOURCES.register("parquet")
class ParquetConversations:
    """Samples of a `ParquetTable`; safe to share among threads, small when pickled."""

    def __init__(self, config: SourceConfig) -> None:
        """Reads the footers.

        Raises:
          DataError: as `ParquetTable`; no column of turns or several, or one that is not there.
        """
        table = ParquetTable(config.path, split=config.split)
        self.template, self.turns = None, config.turns
        if "=>" in config.turns:
            self.template = TurnsTemplate(config.turns, table.names, config.path, "column")
        elif config.turns:
            check_name(config.turns, table.columns, "turns", config.path, "column")
        else:
            found = [name for name in TURNS if name in table.columns]
            if len(found) != 1:
                seen = " and ".join(found) or f"none of the columns {', '.join(TURNS)}"
                raise DataError(
                    f"{config.path} has {seen}; it has {', '.join(table.columns)}: name the column of turns with "
                    "sources.turns=NAME, or what both sides say with sources.turns='{question} => {answer}'"
                )
            (self.turns,) = found
        self.image = self._image_column(table, config)
        unread = [name for name in table.image_columns if name != self.image]
        if unread and config.image_feature:
            logging.warning("source %s: the pictures of %s are not read, those of %s are", config, unread, self.image)
        used = [name.split("/")[0] for name in self.template.names] if self.template else [self.turns]
        beside = [name for name in ("id", *SYSTEMS) if name in table.columns]
        read: list[str] = list(dict.fromkeys([*used, *beside, *([self.image] if self.image else [])]))
        self.table = table.select(read)
        self.images = open_images(config.images) if config.images else _NoFolder()
        self.allow_absolute = config.allow_absolute

    @staticmethod
    def _image_column(table: ParquetTable, config: SourceConfig) -> str:
        """The column of pictures, "" if there is none."""
        name = config.image_feature
        if name in IMAGES and name not in table.columns:
            found = [name for name in IMAGES if name in table.columns] or list(table.image_columns)
            if len(found) > 1:
                raise DataError(
                    f"{config.path} has pictures in {', '.join(found)}: name one with sources.image_feature, or none "
                    "with sources.image_feature=''"
                )
            return found[0] if found else ""
        if name:
            check_name(name, table.columns, "image_feature", config.path, "column")
        return name

    @property
    def version(self) -> tuple[Any, ...]:
        """Changes when a file is replaced."""
        return self.table.version

    def content(self) -> str:
        """A hash of the columns that are read, of pictures their number and paths."""
        return self.table.content()

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Sample:
        """Raises DataError with the sample's id if it cannot be read or is none of the forms."""
        index = range(len(self))[index]
        row = self.table[index]
        given = row.get("id")
        sample_id = str(given) if isinstance(given, str | int) and str(given) else self.table.name(index)
        listed = list(entries(row[self.image])) if self.image else []
        if self.template:
            pictures = [self._picture(picture, self.image, sample_id) for picture in listed]
            return make_sample(sample_id, self.template(lambda name: self._words(row, name)), pictures)
        turns = self._conversation(row[self.turns], sample_id)
        first = turns[0]
        if "user" in first and "assistant" in first:
            pictures = [self._picture(picture, self.image, sample_id) for picture in listed]
            return make_sample(sample_id, _texts(turns, self.turns, sample_id), pictures)
        key, form = ("messages", "chat") if "role" in first else ("conversations", "llava")
        record = {name: row[name] for name in SYSTEMS if name in row} | {key: turns}
        # The forms know where pictures stand; what they are is looked up afterwards.
        said = FORMS[form](record | {"images": [{"place": place} for place in range(len(listed))]}, sample_id)
        pictures = [
            self._picture(
                listed[given["place"]] if isinstance(given, dict) and "place" in given else given, where, sample_id
            )
            for where, given in said.pictures
        ]
        return make_sample(sample_id, said.turns, pictures)

    def _conversation(self, value: Any, sample_id: str) -> list[dict[str, Any]]:
        """The list of turns in a cell."""
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise DataError(f"column {self.turns!r} is text, and no JSON: {error}", sample_id) from error
        if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
            raise DataError(f"column {self.turns!r} should be a list of turns, and is {str(value)[:80]!r}", sample_id)
        return value

    def _words(self, row: Mapping[str, Any], name: str) -> str:
        value: Any = row
        for part in name.split("/"):
            found = entries(value)
            value = found[0].get(part) if found and isinstance(found[0], Mapping) else None
        labels = self.table.labels.get(name)
        known = isinstance(value, int) and labels is not None and 0 <= value < len(labels)
        return labels[value] if known and labels else as_text(value)

    def _picture(self, given: Any, where: str, sample_id: str) -> ImageSource:
        if isinstance(given, ParquetImage):
            return given
        return find_picture(given, where, self.images, self.allow_absolute, sample_id)


class _NoFolder:
    """Where names lead without `sources.images`."""

    def find(self, name: str, sample_id: str, /) -> ImageSource:
        raise DataError(
            f"names the picture {name[:200]!r} instead of holding it: sources.images says where it is", sample_id
        )


def _texts(turns: list[dict[str, Any]], column: str, sample_id: str) -> list[Turn]:
    """[{"user", "assistant"}]: a question and its answer each."""
    said = []
    for number, turn in enumerate(turns):
        for key, role in (("user", USER), ("assistant", ASSISTANT)):
            text = turn.get(key)
            if not isinstance(text, str):
                seen = "is missing" if text is None else f"is of type {type(text).__name__}"
                raise DataError(f"{column}[{number}].{key} should be text, and {seen}", sample_id)
            said.append(Turn(role, text))
        check_unread(turn, ("user", "assistant", "source"), f"{column}[{number}].", False, sample_id)
    return said
