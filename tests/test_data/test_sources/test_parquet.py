"""Parquet as a training source: the Hub's forms say what LLaVA's JSON says, and go the same way through rows."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from saisa_jax.__main__ import main
from saisa_jax.config import Config, ConfigError, SourceConfig, StageConfig
from saisa_jax.data.images import read_image
from saisa_jax.data.pipeline import StageData
from saisa_jax.data.sample import ASSISTANT, USER, DataError, Sample
from saisa_jax.data.sources import open_source
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.testing.configs import tiny_config

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SAMPLES = 14
COLORS = ("red", "blue", "green", "yellow", "black", "gray", "teal")
FORMS = ("texts", "conversations", "messages", "text of JSON")
TINY = "saisa_jax/testing/configs.py"


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), (number, 0, 90)).save(stream, "PNG")
    return stream.getvalue()


def said(number: int, form: str) -> Any:
    """Sample i: i % 3 pictures, one or two questions."""
    asked = [("what color is the shape?", COLORS[number % 7]), ("is it red?", "no")][: 1 + number % 2]
    if form == "texts":
        return [{"user": question, "assistant": answer, "source": "quiz"} for question, answer in asked]
    places = "<image>\n" * (number % 3)
    if form == "messages":
        turns = []
        for place, (question, answer) in enumerate(asked):
            shown = [{"type": "image", "text": None}] * (number % 3 if place == 0 else 0)
            turns.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return turns
    turns = []
    for place, (question, answer) in enumerate(asked):
        turns.append({"from": "human", "value": places + question if place == 0 else question})
        turns.append({"from": "gpt", "value": answer})
    return turns if form == "conversations" else json.dumps(turns)


def table(form: str, numbers: range = range(SAMPLES)) -> pa.Table:
    pictures = [[{"bytes": png(i + j), "path": None} for j in range(i % 3)] for i in numbers]
    column = "conversations" if form == "text of JSON" else form
    return pa.table(
        {
            "id": [f"s{i}" for i in numbers],
            column: [said(i, form) for i in numbers],
            "images": pa.array(pictures, pa.list_(PICTURE)),
            "relevance": [1] * len(numbers),
        }
    )


def write(path: Path, data: pa.Table | dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = data if isinstance(data, pa.Table) else pa.table(data)
    pq.write_table(data, path, row_group_size=4)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder of two shards for each form, and the same as LLaVA's JSON."""
    root = tmp_path_factory.mktemp("forms")
    for form in FORMS:
        write(root / form / "train-00000-of-00002.parquet", table(form, range(9)))
        write(root / form / "train-00001-of-00002.parquet", table(form, range(9, SAMPLES)))
    (root / "images").mkdir()
    records = []
    for i in range(SAMPLES):
        names = [f"{i + j}.png" for j in range(i % 3)]
        for j, name in enumerate(names):
            (root / "images" / name).write_bytes(png(i + j))
        records.append({"id": f"s{i}", "conversations": said(i, "conversations"), "images": names})
    (root / "train.json").write_text(json.dumps(records))
    return root


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("easy_vqa")


def source(path: Path | str, **fields: Any) -> SourceConfig:
    return SourceConfig("parquet", path=str(path), **fields)


def reference(data: Path, **fields: Any) -> SourceConfig:
    return SourceConfig("llava", path=str(data / "train.json"), images=str(data / "images"), **fields)


def words(sample: Sample) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in sample.turns]


def make_config(*sources: SourceConfig, **fields: Any) -> Config:
    config = tiny_config()
    stage = StageConfig(sources=sources, batch_size=2, text_length=96, max_images=4)
    fields = {"packing": True, "turns_per_sample": None, "on_error": "raise", "num_threads": 0, **fields}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **fields), finetune=stage)


def assert_same(one: list, two: list) -> None:
    for a, b in zip(one, two, strict=True):
        assert a.sample_ids == b.sample_ids and a.dropped == b.dropped
        for name in a.batch:
            assert a.batch[name].tobytes() == b.batch[name].tobytes(), name


def batches(config: Config, tokenizer, count: int, start: int = 0) -> list:
    iterator = StageData(config, "finetune", tokenizer).batches()
    iterator.set_state({"next_row": 2 * start})
    found = [next(iterator) for _ in range(count)]
    iterator.close()
    return found


# --- Forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_form_says_what_the_json_says(data, form) -> None:
    samples, expected = open_source(source(data / form)), open_source(reference(data))
    assert len(samples) == SAMPLES
    for i in range(SAMPLES):
        # `texts` have no places: the pictures stand in front, where the encoder puts them
        strip = (
            (lambda text: text.replace("<image>", "").lstrip("\n")) if form != "conversations" else (lambda text: text)
        )
        assert [(r, strip(t)) for r, t in words(samples[i])] == [(r, strip(t)) for r, t in words(expected[i])]
        assert samples[i].id == f"s{i}" and len(samples[i].images) == i % 3
        assert [read_image(image) for image in samples[i].images] == [png(i + j) for j in range(i % 3)]
    copy = pickle.loads(pickle.dumps(samples))
    assert len(pickle.dumps(samples)) < 2500 and [copy[i] for i in range(SAMPLES)] == [
        samples[i] for i in range(SAMPLES)
    ]


def test_pictures_of_messages_by_place_and_by_themselves(tmp_path) -> None:
    part = lambda kind, text=None, image=None: {"type": kind, "text": text, "image": image}  # noqa: E731
    own = {"bytes": png(9), "path": None}
    content = [part("text", "left:"), part("image"), part("text", "own:"), part("image", image=own), part("image")]
    kind = pa.struct([("type", pa.string()), ("text", pa.string()), ("image", PICTURE)])
    turn = pa.struct([("role", pa.string()), ("content", pa.list_(kind))])
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": [part("text", "both")]}]
    columns = {
        "messages": pa.array([messages], pa.list_(turn)),
        "images": pa.array([[png(1), png(2)]], pa.list_(pa.binary())),
        "system": ["be brief"],
    }
    (sample,) = open_source(source(write(tmp_path / "a.parquet", columns)))
    assert words(sample) == [(USER, "left:\n<image>\nown:\n<image>\n<image>"), (ASSISTANT, "both")]
    assert [read_image(image) for image in sample.images] == [png(1), png(9), png(2)]
    assert sample.system == "be brief" and sample.id == "a.parquet:0"


def test_columns_as_a_template(tmp_path) -> None:
    features = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}, "image": {"_type": "Image"}}
    columns = pa.table(
        {
            "question": ["what is {x}?", "and é?", None],
            "answers": [["a cat", "cat"], [], ["a"]],
            "label": [0, 1, 1],
            "info": [{"text": "first"}, None, {"text": "third"}],
            "image": pa.array([{"bytes": png(i), "path": None} for i in range(2)] + [None], PICTURE),
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path = write(tmp_path / "a.parquet", columns)
    read = lambda turns, **more: [words(s) for s in open_source(source(path, turns=turns, **more))]  # noqa: E731
    assert read("{question} => {answers}")[:2] == [
        [(USER, "what is {x}?"), (ASSISTANT, "a cat")],
        [(USER, "and é?"), (ASSISTANT, "")],  # the encoder says that it has no answer
    ]
    assert [said[1][1] for said in read(" => a {label} {info/text}")] == ["a cat first", "a dog ", "a dog third"]
    samples = open_source(source(path, turns="{question} <image> => {label}"))
    assert samples[0].turns[0].text == "<image>\nwhat is {x}?" and read_image(samples[1].images[0]) == png(1)
    with pytest.raises(DataError, match=r"sample 'a.parquet:2': 1 <image> in the text and 0 image"):
        samples[2]
    assert not open_source(source(path, turns="{question} => {label}", image_feature=""))[0].images


def test_names_of_pictures_lead_to_a_folder(tmp_path) -> None:
    columns = {"texts": [[{"user": "what?", "assistant": "red"}]] * 2, "image": ["a.png", "../b.png"]}
    path = write(tmp_path / "a.parquet", columns)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(png(1))
    samples = open_source(source(path, images=str(tmp_path / "images")))
    assert read_image(samples[0].images[0]) == png(1)
    with pytest.raises(DataError, match=r"sample 'a.parquet:1': image '../b.png' is not a path within sources.images"):
        samples[1]
    with pytest.raises(DataError, match=r"'a.png' instead of holding it: sources.images says where it is"):
        open_source(source(path))[0]


# --- Rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
def test_batches_and_their_resumption_are_those_of_the_json(data, tokenizer, packing) -> None:
    """In a mixture, two epochs, stopped and gone on with after every batch."""
    small = {"weight": 0.5}
    expected = batches(make_config(reference(data), reference(data, **small), packing=packing), tokenizer, 12)
    config = make_config(source(data / "conversations"), source(data / "messages", **small), packing=packing)
    assert_same(batches(config, tokenizer, 12), expected)
    for start in (1, 3, 7, 11):
        assert_same(batches(config, tokenizer, 1, start), expected[start : start + 1])


def test_threads_and_workers_read_the_same(data, tokenizer) -> None:
    expected = batches(make_config(source(data / "texts")), tokenizer, 6)
    assert_same(batches(make_config(source(data / "texts"), num_threads=4), tokenizer, 6), expected)
    assert_same(batches(make_config(source(data / "texts"), num_workers=1), tokenizer, 6), expected)


def test_content_is_marked_and_counts_are_made_anew_when_it_changes(data, tokenizer, tmp_path) -> None:
    def state(root: Path) -> tuple[Any, list[int]]:
        stage = StageData(make_config(source(root)), "finetune", tokenizer, str(tmp_path / "cache"))
        return stage.mark, stage.rows.plans.at(0).rows.places.tolist()

    a, b = tmp_path / "a", tmp_path / "b"
    for root in (a, b):
        write(root / "train-00000-of-00001.parquet", table("texts"))
    assert state(a) == state(b)  # wherever it lies
    changed = table("texts").to_pylist()
    changed[3]["texts"][0]["assistant"] = "blue and green and red"
    write(b / "train-00000-of-00001.parquet", pa.Table.from_pylist(changed, schema=table("texts").schema))
    assert state(b)[0]["content"] != state(a)[0]["content"] and state(b)[0]["counts"] != state(a)[0]["counts"]


def test_prepared_shards_hold_the_same(data, tokenizer, tmp_path, capsys) -> None:
    form = tmp_path / "form"
    write(form / "train-00000-of-00001.parquet", table("conversations"))
    argv = [f"--config={TINY}", "--workers=1", "--shards=2", f"--output={tmp_path / 'out'}"]
    argv.append(f"--config.finetune.sources=({{'format': 'parquet', 'path': '{form}'}},)")
    assert main(["data", "prepare", *argv]) == 0
    made = (tmp_path / "out/index.json").stat().st_mtime_ns
    shards = SourceConfig("arrayrecord", path=str(tmp_path / "out"))
    assert_same(batches(make_config(shards), tokenizer, 6), batches(make_config(reference(data)), tokenizer, 6))
    assert main(["data", "prepare", *argv]) == 0
    assert (tmp_path / "out/index.json").stat().st_mtime_ns == made  # nothing has changed
    write(form / "train-00000-of-00001.parquet", table("conversations", range(1, SAMPLES + 1)))
    capsys.readouterr()
    assert main(["data", "prepare", *argv]) == 0
    assert "its data has changed since it was prepared: all is made anew" in capsys.readouterr().out
    assert open_source(shards)[0].id == "s1"


# --- What cannot be used ---------------------------------------------------------------------------------------------


def bad(number: int, **columns: Any) -> pa.Table:
    """The good samples, with other columns in row `number`."""
    rows = table("texts").to_pylist()
    rows[number] |= {"id": "bad", **columns}
    return pa.Table.from_pylist(rows, schema=table("texts").schema)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"texts": None}, r"column 'texts' should be a list of turns, and is 'None'"),
        ({"texts": []}, r"column 'texts' should be a list of turns, and is '\[\]'"),
        ({"texts": [{"user": "what?", "assistant": None}]}, r"texts\[0\].assistant should be text, and is missing"),
        ({"texts": [{"user": "<image> <image> what?", "assistant": "a"}]}, r"2 <image> in the text and 1 image"),
        ({"images": [{"bytes": png(1)[:40], "path": None}]}, r"cannot read .*:4/images\[0\]"),
        ({"images": [{"bytes": None, "path": "a.png"}]}, r"has no bytes, and names 'a.png'"),
        ({"images": [None]}, r"has no bytes"),
    ],
)
def test_a_bad_sample(tmp_path, tokenizer, columns, message, packing) -> None:
    path = write(tmp_path / "a.parquet", bad(4, **columns))
    with pytest.raises(DataError, match=rf"sample 'bad': .*{message}"):
        batches(make_config(source(path), packing=packing), tokenizer, SAMPLES // 2)
    config = make_config(source(path), packing=packing, on_error="drop", max_drop=1.0)
    found = batches(config, tokenizer, SAMPLES // 2)
    names = {name for host in found for row in host.sample_ids for name in row}
    dropped = [line for host in found for line in host.dropped]
    assert {f"s{i}" for i in range(SAMPLES) if i != 4} <= names
    assert all("'bad'" in line for line in dropped) and (dropped or "bad" not in names)


@pytest.mark.parametrize(
    ("columns", "fields", "message"),
    [
        ({"texts"}, {"turns": "text"}, r"sources.turns: .* has no column 'text'; did you mean texts\?"),
        ({"answer"}, {}, r"none of the columns texts, .*messages; it has answer: .*'{question} => {answer}'"),
        ({"texts", "messages"}, {}, r"a.parquet has texts and messages; it has .*sources.turns=NAME"),
        ({"texts"}, {"image_feature": "img"}, r"sources.image_feature: .* has no column 'img'; it has texts"),
        ({"texts", "images"}, {"image_feature": "images2"}, r"no column 'images2'; did you mean images\?"),
        ({"question"}, {"turns": "{questoin} => a"}, r".* no column 'questoin'; did you mean question\?"),
    ],
)  # fmt: skip
def test_columns_that_are_not_there(tmp_path, columns, fields, message) -> None:
    path = write(tmp_path / "a.parquet", {name: ["x"] for name in sorted(columns, reverse=True)})
    with pytest.raises(DataError, match=message):
        open_source(source(path, **fields))


def test_pictures_of_which_one_has_to_be_chosen(tmp_path, caplog) -> None:
    pictures = {name: pa.array([{"bytes": png(i), "path": None}], PICTURE) for i, name in enumerate(("left", "right"))}
    path = write(tmp_path / "a.parquet", {"texts": [[{"user": "what?", "assistant": "red"}]], **pictures})
    with pytest.raises(DataError, match=r"has pictures in left, right: name one with sources.image_feature"):
        open_source(source(path))
    with caplog.at_level("WARNING", "absl"):
        (sample,) = open_source(source(path, image_feature="right"))
    assert read_image(sample.images[0]) == png(1) and "the pictures of ['left'] are not read" in caplog.text
    with pytest.raises(ConfigError, match=r"format='parquet' needs path"):
        SourceConfig("parquet")


@pytest.mark.parametrize("count", [40, pytest.param(800, marks=pytest.mark.slow)])
def test_every_failure_is_a_data_error(tmp_path, count) -> None:
    """Bytes of a file changed, cut off or put in: it is read as it was, or refused with its name."""
    whole = write(tmp_path / "whole.parquet", table("conversations")).read_bytes()
    footer = len(whole) - int.from_bytes(whole[-8:-4], "little") - 8
    outcome = dict.fromkeys(("used", "sample refused", "file refused"), 0)
    path = tmp_path / "a.parquet"
    for number in range(count):
        rng = np.random.default_rng(number)
        content = bytearray(whole)
        place = int(rng.integers(footer if number % 3 else 0, len(whole)) if number % 2 else rng.integers(footer))
        noise = rng.integers(0, 256, int(rng.integers(1, 9)), np.uint8).tobytes()
        content[place : place + (len(noise) if number % 5 else 40)] = noise
        path.write_bytes(content if number % 7 else content[:place])
        try:
            samples = open_source(source(path))
        except DataError as error:
            assert "a.parquet" in str(error), error
            outcome["file refused"] += 1
            continue
        for i in range(len(samples)):
            try:
                sample = samples[i]
                [read_image(image, sample.id) for image in sample.images]
                outcome["used"] += 1
            except DataError as error:
                assert error.sample_id, error
                outcome["sample refused"] += 1
    assert all(number > count / 8 for number in outcome.values()), outcome
    assert os.path.exists(path)
