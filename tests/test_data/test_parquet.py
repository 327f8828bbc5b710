"""Parquet files by row: pictures of every form that the Hub has, shares of hosts, and files that are not whole."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from saisa_jax import buckets
from saisa_jax.config import VisionConfig
from saisa_jax.data.parquet import ParquetImage, ParquetTable, find_files
from saisa_jax.data.sample import DataError, StoredImage
from saisa_jax.data.views import ImageLoader

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ROWS, GROUP = 23, 4


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def cell(shade: int, path: str | None = None) -> dict:
    return {"bytes": png(shade), "path": path}


def table(start: int = 0, rows: int = ROWS) -> pa.Table:
    """Row i: a question, a label, i % 3 pictures in lists, and one picture, which every fifth row has not."""
    numbers = range(start, start + rows)
    columns = {
        "question": pa.array([f"what is {i}?" for i in numbers]),
        "label": pa.array([i % 2 for i in numbers]),
        "image": pa.array([None if i % 5 == 0 else cell(i, f"{i}.png") for i in numbers], PICTURE),
        "images": pa.array([[cell(i + j) for j in range(i % 3)] for i in numbers], pa.list_(PICTURE)),
        "raw": pa.array([None if i % 5 == 0 else png(i) for i in numbers], pa.binary()),
        "raws": pa.array([[png(i + j) for j in range(i % 3)] for i in numbers], pa.list_(pa.binary())),
        "sound": pa.array([{"bytes": b"RIFF", "path": None}] * rows, PICTURE),
    }
    kinds = {"image": {"_type": "Image"}, "images": {"feature": {"_type": "Image"}, "_type": "List"}}
    features = {**kinds, "raws": [{"_type": "Image"}], "sound": {"_type": "Audio"}, "question": {"_type": "Value"}}
    features["label"] = {"_type": "ClassLabel", "names": ["no", "yes"]}
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write(path: Path | str, start: int = 0, rows: int = ROWS) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(start, rows), path, row_group_size=GROUP)
    return Path(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two splits of shards, as `hf download` lays them down."""
    root = tmp_path_factory.mktemp("hub")
    for number in range(3):
        write(root / f"data/train-{number:05d}-of-00003-0123456789abcdef.parquet", number * ROWS)
    write(root / "data/test-00000-of-00001.parquet", 100, 2)
    write(root / ".cache/huggingface/other.parquet")
    return root


def test_a_row_and_its_pictures(data) -> None:
    rows = ParquetTable(data, split="train")
    assert len(rows) == 3 * ROWS
    assert rows.image_columns == ("image", "images", "raw", "raws") and rows.labels == {"label": ("no", "yes")}
    loader = ImageLoader(VisionConfig(image_size=2, patch_size=1, image_mode="resize"))
    for i in (0, 1, 5, 22, 23, 24, 50, 68, 3):
        row = rows[i]
        assert row["question"] == f"what is {i}?" and row["label"] == i % 2 and row["sound"]["bytes"] == b"RIFF"
        assert (row["image"] is None) == (row["raw"] is None) == (i % 5 == 0)
        if i % 5:
            assert row["image"].read() == row["raw"].read() == png(i) and isinstance(row["image"], StoredImage)
            assert loader(row["image"])[0, 0, 0, 0] == i
        assert [one.read() for one in row["images"]] == [one.read() for one in row["raws"]] == [
            png(i + j) for j in range(i % 3)
        ]  # fmt: skip
    assert rows[-1]["question"] == "what is 68?"
    with pytest.raises(IndexError):
        rows[3 * ROWS]
    assert rows[24]["image"].name == f"{data}/data/train-00001-of-00003-0123456789abcdef.parquet:1/image"
    assert rows.column("question") == [f"what is {i}?" for i in range(3 * ROWS)]


def test_only_chosen_columns_and_no_picture_before_it_is_asked_for(data, monkeypatch) -> None:
    read: list[tuple[str, ...]] = []
    original = ParquetTable._read
    monkeypatch.setattr(
        ParquetTable, "_read", lambda self, n, g, columns: read.append(tuple(columns)) or original(self, n, g, columns)
    )
    rows = ParquetTable(data, split="train", columns=("question", "image", "images"))
    images = [rows[i]["image"] for i in range(ROWS)]
    assert set(rows[0]) == {"question", "image", "images"}
    assert read == [("question", "image.path", "images.list.element.path")] * 6  # a group once: ceil(23 / 4)
    images[1].read(), images[2].read(), images[6].read(), images[3].read()
    assert read[6:] == [("image",)] * 2
    small = ParquetTable(data, split="train", columns=("image",), cache_bytes=1)  # the last group alone is kept
    assert [small[i]["image"].read() == png(i) for i in (1, 2, 9, 1)] == [True] * 4
    assert len(small._groups) == 1


def test_another_process_is_handed_the_footers_alone(data) -> None:
    rows = ParquetTable(data, split="train")
    kept = rows[1]["image"]
    copy, image = pickle.loads(pickle.dumps((rows, kept)))
    assert len(pickle.dumps(rows)) < 1500 and len(copy) == len(rows)
    assert image == kept and image.read() == png(1) and copy[30] == rows[30] and copy.version == rows.version


def test_threads_share_it(data) -> None:
    rows = ParquetTable(data, split="train", columns=("image",), cache_bytes=2000)
    order = np.random.default_rng(0).permutation([i for i in range(len(rows)) if i % 5] * 4).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda i: rows[i]["image"].read() == png(i), order))


@pytest.mark.parametrize("hosts", [1, 2, 3, 4, 7, 30])
def test_shares_are_whole_groups(data, hosts) -> None:
    rows = ParquetTable(data, split="train")
    shares = [rows.share(host, hosts) for host in range(hosts)]
    assert [i for share in shares for i in share] == list(range(3 * ROWS))
    starts = {number * ROWS + group for number in range(3) for group in range(0, ROWS, GROUP)}
    assert {share.start for share in shares if share} <= starts
    if hosts < 8:
        assert max(map(len, shares)) - min(map(len, shares)) <= 2 * GROUP


def test_files_folders_and_patterns(data, tmp_path, monkeypatch) -> None:
    one = data / "data/train-00001-of-00003-0123456789abcdef.parquet"
    assert len(ParquetTable(one)) == ROWS and ParquetTable(one).name(3) == f"{one.name}:3"
    assert len(ParquetTable(data, split="test")) == 2
    assert len(ParquetTable(f"{data}/data/train-0000[02]-of-*")) == 2 * ROWS  # a pattern may choose shards
    monkeypatch.chdir(data)
    assert find_files("data/t*.parquet")[0] == "data/" and len(find_files("./data/", "train")[1]) == 3
    assert ParquetTable("*/train*.parquet").name(ROWS) == "data/train-00001-of-00003-0123456789abcdef.parquet:0"
    for subject in ("Art", "Music"):  # rows of one name in two folders have two names
        write(tmp_path / subject / "validation-00000-of-00001.parquet", rows=2)
    rows = ParquetTable(tmp_path)
    ends = "validation-00000-of-00001.parquet"
    assert [rows.name(1), rows.name(2)] == [f"Art/{ends}:1", f"Music/{ends}:0"]
    for name in ("train/0000.parquet", "train/0001.parquet", "test/0000.parquet"):  # as the Hub converts data sets
        write(tmp_path / "converted" / name, rows=3)
    assert len(ParquetTable(tmp_path / "converted", split="train")) == 6
    write(tmp_path / "plain/numbers.parquet", rows=3)
    assert len(ParquetTable(tmp_path / "plain", split="train")) == 3  # a file without a split is all there is


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("nowhere", {}, r"nowhere' is neither a file, a folder nor a pattern of names here"),
        ("data/*.jpg", {}, r"no file matches '.*data/\*.jpg'"),
        ("", {}, r"holds several splits: test, train; choose one"),
        ("", {"split": "val"}, r"has no split 'val'; it has test, train"),
        (
            "",
            {"split": "train", "columns": ("questoin",)},
            r"train-0.* no column 'questoin'; did you mean question\?; it has question, label, image",
        ),
        ("data/test*", {"columns": ("zzz",)}, r"test-00000-of-00001.parquet has no column 'zzz'; it has question, "),
    ],
)
def test_what_is_not_there(data, path, options, message) -> None:
    with pytest.raises(DataError, match=message):
        ParquetTable(f"{data}/{path}" if path else data, **options)


def test_shards_that_are_missing_cut_or_other_files(data, tmp_path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(data, root)
    second = root / "data/train-00001-of-00003-0123456789abcdef.parquet"
    whole = second.read_bytes()
    for content, message in [
        (whole[:-100], "is not a Parquet file, or is cut"),
        (whole[: len(whole) // 2], "is not a Parquet file, or is cut"),
        (b"", "it has 0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "it is a Git LFS pointer"),
    ]:
        second.write_bytes(content)
        with pytest.raises(DataError, match=rf"train-00001-of-00003-0123456789abcdef.parquet .*{message}"):
            ParquetTable(root, split="train")
    second.unlink()
    with pytest.raises(
        DataError, match=r"1 of 3 shards are missing, the first is train-00001-of-00003.parquet; .*train-\*"
    ):
        ParquetTable(root, split="train")
    pq.write_table(table().slice(0, 0), tmp_path / "none.parquet")
    with pytest.raises(DataError, match=r"none.parquet is empty: no rows in "):
        ParquetTable(tmp_path / "none.parquet")
    with pytest.raises(DataError, match=r"converted' holds no .parquet file"):
        (tmp_path / "converted").mkdir()
        ParquetTable(tmp_path / "converted")


def test_a_damaged_group_names_file_and_row(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table(), path, row_group_size=GROUP, write_page_checksum=True, compression="none")
    content = bytearray(path.read_bytes())
    place = content.index(b"what is 9?")
    content[place] = 0xFF
    path.write_bytes(content)
    rows = ParquetTable(path, columns=("question", "image"))
    assert rows[7]["question"] == "what is 7?" and rows[12]["image"].read() == png(12)
    with pytest.raises(DataError, match=r"sample 'a.parquet:8': .*a.parquet: row group 2 cannot be read: .*"):
        rows[8]
    assert rows[9 - 2]["image"].read() == png(7)
    write(path, rows=5)
    with pytest.raises(DataError, match=r"a.parquet has changed since it was opened; start again"):
        pickle.loads(pickle.dumps(rows))[0]


def test_a_picture_without_bytes(tmp_path) -> None:
    cells = [{"bytes": None, "path": "a.png"}, {"bytes": b"", "path": None}, cell(3)]
    columns = {"image": pa.array(cells, PICTURE), "images": pa.array([[None]] * 3, pa.list_(PICTURE))}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    rows = ParquetTable(tmp_path / "a.parquet")
    assert rows[2]["image"].read() == png(3)
    for picture, message in [
        (rows[0]["image"], r"column 'image' has no bytes, and names 'a.png': pictures beside the file are not read"),
        (rows[1]["image"], r"column 'image' has no bytes$"),
        (rows[0]["images"][0], r"column 'images' has no bytes$"),
    ]:
        assert isinstance(picture, ParquetImage)
        with pytest.raises(DataError, match=rf"cannot read .*a.parquet:\d/images?(\[0\])?: {message}"):
            ImageLoader(VisionConfig(image_size=2, patch_size=1, image_mode="resize"))(picture)


def test_a_bucket(data, bucket) -> None:
    for file in (data / "data").iterdir():
        (buckets.place("gs://bucket/hub/data") / file.name).write_bytes(file.read_bytes())
    for where in ({"path": "gs://bucket/hub", "split": "train"}, {"path": "gs://bucket/hub/data/train-*.parquet"}):
        rows = ParquetTable(**where)
        assert len(rows) == 3 * ROWS and rows[40]["question"] == "what is 40?"
        assert rows[41]["image"].read() == png(41)
        assert rows.name(40).endswith("train-00001-of-00003-0123456789abcdef.parquet:17")
        assert pickle.loads(pickle.dumps(rows))[68]["image"].read() == png(68)
