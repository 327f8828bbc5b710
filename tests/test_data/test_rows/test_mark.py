"""Marks of content: a changed word is seen wherever it lies, and a place is not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from saisa_jax.config import SourceConfig
from saisa_jax.data.rows.mark import content_mark, same_content
from saisa_jax.data.sample import Sample, Turn
from saisa_jax.data.sources import record_files
from saisa_jax.data.sources.record_files import records_digest
from saisa_jax.data.sources.shards import Index, Shard, ShardedSamples, encode_record, write_shard


def records(changed: int | None = None) -> list[bytes]:
    """300 samples; the answer of one may be another word of the same length."""
    answers = ["blue" if number == changed else "teal" for number in range(300)]
    turns = [(Turn("user", "what is it?"), Turn("assistant", answer)) for answer in answers]
    return [encode_record(Sample(f"s{number}", said, ()), ()) for number, said in enumerate(turns)]


def write_set(folder: Path, changed: int | None = None, with_contents: bool = True) -> ShardedSamples:
    """Two shards and their index; `with_contents=False`: as earlier versions wrote it."""
    folder.mkdir()
    made = records(changed)
    parts = [made[:200], made[200:]]
    written = [write_shard(epath.Path(folder / f"{number}.arrayrecord"), part) for number, part in enumerate(parts)]
    shards = tuple(Shard(f"{n}.arrayrecord", len(part), written[n][0]) for n, part in enumerate(parts))
    ones = np.ones(300, np.int32)
    contents = tuple(digest for _, digest in written) if with_contents else ()
    Index(shards, "f", {}, ones, 0 * ones, contents).write(epath.Path(folder))
    return open_set(folder)


def open_set(folder: Path | epath.Path) -> ShardedSamples:
    return ShardedSamples(SourceConfig("arrayrecord", str(folder)))


def mark(folder: Path) -> str:
    return content_mark(open_set(folder), SourceConfig("arrayrecord", str(folder)))


@pytest.mark.parametrize("with_contents", [True, False])
def test_a_changed_label_in_a_shard_is_seen(tmp_path, with_contents: bool) -> None:
    """Of the same length, in a file of the same size: made anew, or put in place of a shard behind the index's back."""
    write_set(tmp_path / "a", None, with_contents)
    first = mark(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere", copy_function=shutil.copy)  # with times of their own
    assert mark(tmp_path / "elsewhere") == first
    write_set(tmp_path / "b", 150, with_contents)
    assert os.stat(tmp_path / "a" / "0.arrayrecord").st_size == os.stat(tmp_path / "b" / "0.arrayrecord").st_size
    assert not same_content([mark(tmp_path / "b")], [first])
    shutil.copy(tmp_path / "b" / "0.arrayrecord", tmp_path / "a" / "0.arrayrecord")
    assert mark(tmp_path / "a") == mark(tmp_path / "b")


def test_an_index_that_says_what_its_files_hold_is_believed(tmp_path, monkeypatch) -> None:
    """No shard is opened for it, so that one in a bucket is not copied here."""
    write_set(tmp_path / "a")
    before = mark(tmp_path / "a")
    monkeypatch.setattr("saisa_jax.data.sources.shards.records_digest", None)
    assert mark(tmp_path / "a") == before
    shutil.copytree(tmp_path / "a", tmp_path / "bucket", copy_function=shutil.copy)
    held = open_set(tmp_path / "bucket")
    monkeypatch.setattr("saisa_jax.buckets.is_remote", lambda path: True)
    assert held.content() == before


def test_every_sample_of_another_source_counts() -> None:
    def said(changed: int | None) -> list[Sample]:
        words = ["blue" if number == changed else "teal" for number in range(2000)]
        return [Sample(str(n), (Turn("user", "what?"), Turn("assistant", word)), ()) for n, word in enumerate(words)]

    source = SourceConfig("easy_vqa")
    marks = {content_mark(said(changed), source) for changed in (None, 0, 1001, 1999)}
    assert len(marks) == 4 and content_mark(said(None), source) in marks


def test_marks_of_two_kinds_are_not_compared() -> None:
    """A checkpoint of an earlier version, whose mark of a folder was of 256 samples, is still resumed from."""
    assert same_content(["0123", "4567"], ["0123", "records:89ab"])
    assert not same_content(["0123", "4567"], ["0124", "records:89ab"])
    assert not same_content(["0123", "records:4567"], ["0123", "records:89ab"])


@pytest.mark.parametrize(
    "sizes",
    [[], [0], [10] * 2000, [65_400, 65_472, 65_496, 65_536, 3], [200_000, 1, 70_000]],
    ids=["none", "empty", "small", "blocks", "large"],
)
def test_the_checksums_of_a_file_are_found_wherever_its_blocks_end(tmp_path, monkeypatch, sizes) -> None:
    """Each record's own byte is known by them; the whole file is not read for it."""
    monkeypatch.setattr(record_files.hashlib, "file_digest", None)
    rng, path = np.random.default_rng(0), epath.Path(tmp_path / "a.arrayrecord")
    made = [rng.bytes(size) for size in sizes]
    _, first = write_shard(path, made)
    assert records_digest(path) == write_shard(path, made)[1] == first
    for number in {0, len(made) // 2, len(made) - 1} & set(range(len(made))):
        flipped = bytes([made[number][0] ^ 1]) + made[number][1:] if made[number] else b"x"
        assert write_shard(path, [*made[:number], flipped, *made[number + 1 :]])[1] != first


def test_a_file_that_is_none_is_hashed_whole(tmp_path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    (tmp_path / "b").write_bytes(b"x" * 99 + b"y")
    assert records_digest(tmp_path / "a") != records_digest(tmp_path / "b")
