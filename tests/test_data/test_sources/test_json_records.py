"""JSON files: every record where it was found, and a message that says where a file is broken."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import threading

import pyarrow
import pytest

from saisa_jax.data.sample import DataError, SourceChangedError
from saisa_jax.data.sources.json_records import JsonRecords

RECORDS = [
    {"id": i, "text": text} for i, text in enumerate(["a", "é", "日本語", "🙂 \ud83d\ude42", "\u2028", '"[{,\\'])
]
RECORDS = json.loads(json.dumps(RECORDS))


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("form", ["compact", "indented", "lines", "bom"])
def test_records_are_what_was_written(tmp_path, ascii_only, form) -> None:
    path = tmp_path / ("a.jsonl" if form == "lines" else "a.json")
    if form == "lines":
        lines = [json.dumps(record, ensure_ascii=ascii_only) for record in RECORDS]
        path.write_text("\n\n" + " \r\n".join(lines), "utf-8", newline="")
    else:
        text = json.dumps(RECORDS, ensure_ascii=ascii_only, indent=2 if form == "indented" else None)
        path.write_text(text, "utf-8-sig" if form == "bom" else "utf-8")
    records = JsonRecords(path)
    assert list(records) == RECORDS
    copy = pickle.loads(pickle.dumps(records))
    assert [copy[i] for i in reversed(range(len(copy)))] == RECORDS[::-1]
    assert records.name(3) == f"{path.name}:3"


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_a_packed_file_is_read_as_the_plain_one(tmp_path, monkeypatch, form) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = json.dumps(RECORDS) if form == "json" else "\n".join(json.dumps(record) for record in RECORDS)
    path = tmp_path / f"a.{form}.gz"
    path.write_bytes(gzip.compress(text.encode()))
    records = JsonRecords(path)
    assert list(records) == RECORDS == list(pickle.loads(pickle.dumps(records)))
    assert records.name(3) == f"{path.name}:3"
    path.write_bytes(gzip.compress(b'[{"id": 9}]' if form == "json" else b'{"id": 9}\n'))
    assert list(JsonRecords(path)) == [{"id": 9}]  # what was unpacked before does not stand for it
    path.write_bytes(gzip.compress(b"[1, 2"))
    with pytest.raises(DataError, match=rf"a.{form}.gz, line 1, byte"):
        JsonRecords(path)
    path.write_bytes(gzip.compress(text.encode())[:-9])
    with pytest.raises(DataError, match=r"cannot be unpacked to .*: Compressed file ended"):
        JsonRecords(path)


def test_zstandard(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, codec = tmp_path / "a.jsonl.zst", pyarrow.Codec("zstd")
    frames = [codec.compress(f'{{"id": {n}}}\n'.encode(), asbytes=True) for n in range(2)]
    path.write_bytes(b"".join(frames))  # several frames, as parallel packers write them
    assert list(JsonRecords(path)) == [{"id": 0}, {"id": 1}]
    path.write_bytes(frames[0][:-4])
    with pytest.raises(DataError, match=r"cannot be unpacked to .*: Truncated compressed stream"):
        JsonRecords(path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_utf_16_is_called_by_its_name(tmp_path, name) -> None:
    path = tmp_path / name
    path.write_text('[{"id": 1}]', "utf-16")
    with pytest.raises(DataError, match="is UTF-16: write it as UTF-8"):
        JsonRecords(path)


def test_pickled_it_is_small_and_threads_share_it(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": "x" * 1000}) + "\n" for i in range(500)))
    records = pickle.loads(pickle.dumps(JsonRecords(path)))
    assert len(pickle.dumps(records)) < 500 * 16 + 1000
    wrong: list[int] = []

    def read(offset: int) -> None:
        wrong.extend(i for i in range(500) if records[(i + offset) % 500]["id"] != (i + offset) % 500)

    threads = [threading.Thread(target=read, args=(70 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "", "is empty"),
        ("a.json", " \n", r"line 2, byte 2: the file is cut: an array '\[' of samples is expected"),
        ("a.json", '{"data": []}', r"line 1, byte 0: an array '\[' of samples is expected .*name it .jsonl"),
        ("a.json", '[\n{"id": 1},\n{"id": 2', r"line 3, byte 21: the file is cut"),
        ("a.json", '[\n{"id": 1},\n{"id": "é', r"line 3, byte 20: the file is cut: Unterminated string"),
        ("a.json", '[\n{"id": 1}', r"line 2, byte 11: the file is cut: ',' or '\]' is expected after a sample"),
        ("a.json", '[{"id": "é日"},\n{"id" 2}]', r"line 2, byte 24: Expecting ':' delimiter"),
        ("a.json", '[{"id": 1} {"id": 2}]', r"line 1, byte 11: ',' or '\]' is expected"),
        ("a.json", '[{"id": 1},]', r"line 1, byte 11: Expecting value"),
        ("a.json", '[{"id": 1}]\n]', r"line 2, byte 12: something follows the array"),
        ("a.json", '[{"id": NaN}]', r"line 1, byte 1: NaN is not JSON"),
        ("a.json", "[" * 100_000, r"line 1, byte 1"),
        ("a.json", '[{"id": "a\tb"}]', r"line 1, byte 10: Invalid control character"),
        ("a.json", "[" + "9" * 5000 + "]", r"line 1, byte 1: .*digits"),
        ("a.jsonl", '{"id": 1}\n{"id": 2', r"line 2, byte 18: the file is cut"),
        ("a.jsonl", '{"id": 1}\n{"id":\n2}', r"line 2, byte 16: a line is one whole sample"),
        ("a.jsonl", '{"id": 1} {"id": 2}\n', r"line 1, byte 10: a line is one whole sample"),
        ("a.jsonl", '\n[{"id": 1}]', r"line 2, byte 1: .* an object \{...\} \(an array of samples: name it .json\)"),
        ("a.txt", "[]", r"neither a .json array nor a .jsonl file"),
    ],
)
def test_a_broken_file_is_named_with_line_and_byte(tmp_path, name, text, message) -> None:
    path = tmp_path / name
    path.write_text(text, "utf-8")
    with pytest.raises(DataError, match=rf"{name}.*{message}"):
        JsonRecords(path)


def test_every_cut_of_a_file_is_found(tmp_path) -> None:
    path = tmp_path / "a.json"
    whole = json.dumps(RECORDS, ensure_ascii=False, indent=1).encode()
    for size in range(1, len(whole), 3):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"a\.json, line \d+, byte \d+: the file is cut"):
            JsonRecords(path)


def test_what_is_not_there_or_changes(tmp_path) -> None:
    with pytest.raises(DataError, match=r"sources.path='.*none.json' cannot be read: No such file"):
        JsonRecords(tmp_path / "none.json")
    with pytest.raises(DataError, match=r"is not on a disk: copy it here"):
        JsonRecords("gs://bucket/a.json")
    path = tmp_path / "a.json"
    path.write_text("[1, 2]")
    records = JsonRecords(path)
    path.write_text("[1, 2, 3]")
    with pytest.raises(DataError, match=r"has changed since it was opened"):
        records[0]
    assert len(JsonRecords(path)) == 3


def test_a_file_that_is_being_read(tmp_path) -> None:
    """Written over, it is other samples at the old places; replaced by another of its name, it is still there."""
    path, new = tmp_path / "a.json", tmp_path / "new.json"
    path.write_text("[1, 2]")
    records = JsonRecords(path)
    assert records[0] == 1
    new.write_text("[7, 8]")
    new.replace(path)
    assert list(records) == [1, 2]
    with pytest.raises(SourceChangedError, match=r"a.json has changed since it was opened; start again"):
        _ = pickle.loads(pickle.dumps(records))[0]
    records = JsonRecords(path)
    assert records[1] == 8
    path.write_text("[5, 6]")
    os.utime(path, ns=(0, 0))  # the clock of the disk may be coarse
    with pytest.raises(SourceChangedError, match=r"a.json has changed"):
        _ = records[1]


def test_text_that_is_not_utf8_is_the_samples_fault(tmp_path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"id": 1}, {"id": "\xff"}, {"id": 3}]')
    records = JsonRecords(path)
    assert [records[0], records[2]] == [{"id": 1}, {"id": 3}]
    with pytest.raises(DataError, match=r"sample 'a.json:1': byte 20 of .* is not UTF-8"):
        records[1]
