"""`data prepare` and the shards it writes: what goes in comes out, checked, counted, resumable."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image

from saisa_jax.__main__ import main
from saisa_jax.cli.flags import read_config
from saisa_jax.config import SourceConfig
from saisa_jax.data import prepare
from saisa_jax.data.images import read_image
from saisa_jax.data.pipeline import StageData
from saisa_jax.data.records import shrunk
from saisa_jax.data.rows.counting import count
from saisa_jax.data.rows.counts import fingerprint
from saisa_jax.data.sample import DataError, SourceChangedError
from saisa_jax.data.sources import open_source
from saisa_jax.data.sources.shards import ShardedSamples
from saisa_jax.data.text.encoder import Encoder
from saisa_jax.data.text.tokenizer import load_tokenizer

TINY = "saisa_jax/testing/configs.py"
COLORS = ("red", "blue", "green", "yellow", "black", "gray", "teal", "brown")
SAMPLES = 24


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> Path:
    """A LLaVA file of 24 samples, each third of text alone, and its images: noise, so that they have a size."""
    root = tmp_path_factory.mktemp("mine")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    samples = []
    for i in range(SAMPLES):
        question = {"from": "human", "value": "what is the color of the shape?" * (1 + i % 2)}
        record = {"id": f"s{i}", "conversations": [question, {"from": "gpt", "value": COLORS[i % 8]}]}
        if i % 3:
            record["image"] = f"{i}.{'jpg' if i % 2 else 'png'}"
            pixels = rng.integers(0, 256, (30 + i, 60, 3), np.uint8)
            Image.fromarray(pixels).save(root / "images" / record["image"])
        samples.append(record)
    samples[0]["conversations"].insert(0, {"from": "system", "value": "be brief"})
    (root / "train.json").write_text(json.dumps(samples))
    return root


def arguments(mine: Path, to: Path | str, *more: str, file: str = "train.json") -> list[str]:
    source = f"({{'path': '{mine}/{file}', 'images': '{mine}/images'}},)"
    return [f"--config={TINY}", f"--config.finetune.sources={source}", f"--output={to}", "--workers=1", *more]


def open_shards(path: Path | str) -> ShardedSamples:
    source = open_source(SourceConfig("arrayrecord", path=str(path)))
    assert isinstance(source, ShardedSamples)
    return source


def test_what_goes_in_comes_out(mine, tmp_path, capsys) -> None:
    argv = arguments(mine, tmp_path / "out", "--shards=3")
    assert main(["data", "prepare", *argv]) == 0
    out = capsys.readouterr().out
    assert "24 samples with 16 images" in out and "'format': 'arrayrecord'" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "counts.npz", "index.json", "report.jsonl", *(f"shard-0000{i}-of-00003.arrayrecord" for i in range(3)),
    ]  # fmt: skip
    assert (tmp_path / "out" / "report.jsonl").read_text() == ""

    config = read_config(argv[:2])
    tokenizer = load_tokenizer("easy_vqa")
    before, after = open_source(config.finetune.sources[0]), open_shards(tmp_path / "out")
    copy = pickle.loads(pickle.dumps(after))
    assert len(pickle.dumps(after)) < 500
    for i in reversed(range(SAMPLES)):
        one, two = before[i], after[i]
        assert (one.id, one.turns, one.system) == (two.id, two.turns, two.system)
        assert two.images == tuple(read_image(image) for image in one.images)  # the files, byte for byte
        assert copy[i] == two
    assert after[0].system == "be brief"
    found = after.counts(fingerprint(config, "finetune", tokenizer))
    assert found is not None
    part = count(before, Encoder(config, "finetune", tokenizer))
    for got, expected in zip(found, (part.tokens, part.images), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert after.counts(fingerprint(config, "pretrain", tokenizer)) is None  # another template

    # A second start has nothing to do; a start with another plan is refused.
    assert main(["data", "prepare", *argv]) == 0
    assert main(["data", "prepare", *argv, "--image_size=16"]) == 2
    error = capsys.readouterr().err
    assert "was prepared otherwise (image_size: None there, 16 here" in error and "choose another --output" in error


def test_training_reads_the_same_batches(mine, tmp_path) -> None:
    argv = arguments(mine, tmp_path / "out", "--shards=2")
    assert main(["data", "prepare", *argv]) == 0
    shards = f"({{'format': 'arrayrecord', 'path': '{tmp_path}/out'}},)"
    tokenizer = load_tokenizer("easy_vqa")
    batches = []
    for source in (argv[1], f"--config.finetune.sources={shards}"):
        config = read_config([argv[0], source, "--config.finetune.batch_size=2"])
        data = dataclasses.replace(config.data, packing=True, turns_per_sample=None)
        config = dataclasses.replace(config, data=data)
        iterator = StageData(config, "finetune", tokenizer).batches()
        batches.append([next(iterator) for _ in range(4)])
    for one, two in zip(*batches, strict=True):
        assert one.sample_ids == two.sample_ids
        for name in one.batch:
            np.testing.assert_array_equal(one.batch[name], two.batch[name])


def test_what_cannot_be_used_is_reported_and_left_out(mine, tmp_path, capsys) -> None:
    records = json.loads((mine / "train.json").read_text())[:8]
    whole = (mine / "images" / "1.jpg").read_bytes()
    (mine / "images" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (mine / "images" / "none.jpg").write_bytes(b"")
    for record, image in zip(records, ("cut.jpg", "none.jpg", "missing.jpg", "../1.jpg"), strict=False):
        record["image"] = image
    records[4]["conversations"][1]["value"] = " "
    records[5]["conversations"].pop()
    records[6]["conversations"][0]["from"] = "robot"
    (mine / "bad.json").write_text(json.dumps(records))
    assert main(["data", "prepare", *arguments(mine, tmp_path, "--shards=2", file="bad.json")]) == 0
    assert "7 of 8 samples left out" in capsys.readouterr().out
    report = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert [line["id"] for line in report] == [f"s{i}" for i in range(7)]
    for line, reason in zip(
        report,
        ("cannot read", "cannot read", "there is no image", "is not a path within", "empty answer",
         "no token is supervised", "unknown role"),
        strict=True,
    ):  # fmt: skip
        assert reason in line["reason"]
    samples = open_shards(tmp_path)
    assert [sample.id for sample in samples] == ["s7"]
    assert len(samples.contents.shards) == 1  # a shard of nothing is no file
    (mine / "bad.json").write_text(json.dumps(records[:7]))
    assert main(["data", "prepare", *arguments(mine, tmp_path / "2", file="bad.json")]) == 2
    assert "none of 7 samples can be used" in capsys.readouterr().err


def test_a_stopped_one_goes_on(mine, tmp_path, monkeypatch, capsys) -> None:
    whole, argv = arguments(mine, tmp_path / "whole", "--shards=4"), arguments(mine, tmp_path / "out", "--shards=4")
    assert main(["data", "prepare", *whole]) == 0
    real, seen = prepare.with_files, []

    def stopped(*others):
        *others, numbers = others
        for number in numbers:
            seen.append(number)
            if len(seen) == 15:
                raise KeyboardInterrupt
            yield from real(*others, range(number, number + 1))

    monkeypatch.setattr(prepare, "with_files", stopped)
    assert main(["data", "prepare", *argv]) == 130
    assert "stopped; the same command resumes" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.part"))
    assert len(list((tmp_path / "out").glob("*.arrayrecord"))) == 2
    with pytest.raises(DataError, match=r"there is no .*index.json: it is written last"):
        open_shards(tmp_path / "out")
    assert main(["data", "prepare", *argv, "--image_size=16"]) == 2  # another plan does not go on with it
    assert main(["data", "prepare", *argv]) == 0
    assert seen == [*range(15), *range(12, SAMPLES)]
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def _colors(root: Path, answers: list[str], missing: tuple[int, ...] = (), form: str = "folder") -> list[str]:
    """Writes samples with a picture each, and tells how to prepare them."""
    (root / "images").mkdir(exist_ok=True)
    records, files = [], {}
    for number, answer in enumerate(answers):
        turns = [{"from": "human", "value": "what color?"}, {"from": "gpt", "value": answer}]
        records.append({"id": f"s{number}", "image": f"{number}.png", "conversations": turns})
        if number not in missing:
            stream = io.BytesIO()
            Image.new("RGB", (8, 8), answer).save(stream, "PNG")
            files[f"{number}.png"] = stream.getvalue()
    (root / "train.json").write_text(json.dumps(records))
    if form == "zip":
        with zipfile.ZipFile(root / "images.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        for name, data in files.items():
            path = root / "images" / name
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)
    source = f"({{'path': '{root}/train.json', 'images': '{root}/images{'.zip' * (form == 'zip')}'}},)"
    return [f"--config={TINY}", f"--config.finetune.sources={source}", f"--output={root}/out", "--workers=1"]


def _answers(root: Path) -> list[str]:
    shards = open_shards(root / "out")
    return [shards[number].turns[1].text for number in range(len(shards))]


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_data_that_was_mended_is_prepared_anew(tmp_path, capsys, form) -> None:
    wrong, right = ["red"] * 8, [*["red"] * 4, *["blue"] * 4]
    argv = [*_colors(tmp_path, wrong, (2,), form), "--shards=4"]
    assert main(["data", "prepare", *argv]) == 0
    assert len(_answers(tmp_path)) == 7
    made = (tmp_path / "out" / "index.json").stat().st_mtime_ns
    again = [*_colors(tmp_path, wrong, (2,), form), "--shards=4"] if form == "folder" else argv
    assert main(["data", "prepare", *again]) == 0  # the same, written again
    assert (tmp_path / "out" / "index.json").stat().st_mtime_ns == made  # nothing has changed
    capsys.readouterr()
    for answers, missing in ((right, (2,)), (right, ()), (right[:6], ())):  # labels; a picture; fewer samples
        argv = [*_colors(tmp_path, answers, missing, form), *(["--shards=4"] if len(answers) == 8 else [])]
        assert main(["data", "prepare", *argv]) == 0
        assert "its data has changed since it was prepared: all is made anew" in capsys.readouterr().out
        assert _answers(tmp_path) == [a for n, a in enumerate(answers) if n not in missing]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"counts.npz", "index.json", "report.jsonl", "shard-00000-of-00001.arrayrecord"}


def test_a_stopped_one_that_goes_on_with_mended_data_is_not_half_old(tmp_path, monkeypatch, capsys) -> None:
    argv = [*_colors(tmp_path, ["red"] * 8), "--shards=4"]
    make, made = prepare._make_shard, []

    def stopped(job, number, *rest):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(number)
        make(job, number, *rest)

    monkeypatch.setattr(prepare, "_make_shard", stopped)
    assert main(["data", "prepare", *argv]) == 130
    monkeypatch.setattr(prepare, "_make_shard", make)
    answers = [*["red"] * 4, *["blue"] * 4]
    _colors(tmp_path, answers)
    assert main(["data", "prepare", *argv]) == 0
    out = capsys.readouterr().out
    assert "1 of 3 finished shards hold other data than there is now: they are made anew" in out
    assert "2 of 4 shards are there" in out
    assert _answers(tmp_path) == answers


@pytest.mark.parametrize(("mode", "size"), [("pad", (48, 16)), ("square", (96, 32)), ("resize", (32, 32))])
def test_larger_images_are_made_smaller(mode, size) -> None:
    image = Image.new("RGB", (120, 40), "red")
    for kind, tolerance in (("JPEG", 3), ("PNG", 0)):
        stream = io.BytesIO()
        image.save(stream, kind)
        target = 48 if mode == "pad" else 32
        small = Image.open(io.BytesIO(shrunk(image, stream.getvalue(), target, mode)))
        assert (small.size, small.format, small.mode) == (size, kind, "RGB")
        assert np.abs(np.asarray(small).astype(int) - (255, 0, 0)).max() <= tolerance
        assert shrunk(image, stream.getvalue(), 120, "pad") == stream.getvalue()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--source=1",), "--source=1 is not one of finetune.sources, which lists 1"),
        (("--split=validation", "--config.finetune.validation=()"), "finetune.validation is empty"),
        (("--shards=25",), "--shards=25 of 24 samples"),
        (("--config.finetune.template=chatm",), "did you mean chatml"),
        (("--config.finetune.sources=({'path': 'none.json'},)",), "sources.path='none.json' cannot be read"),
        (("--config.finetune.sources=({'format': 'easy_vqa'}, {'format': 'easy_vqa', 'weight': 0.5})",),
         "prepare them one by one with --source=0"),
    ],
)  # fmt: skip
def test_what_cannot_be_prepared(mine, tmp_path, capsys, more, message) -> None:
    assert main(["data", "prepare", *arguments(mine, tmp_path / "out", *more)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_damaged_shards(mine, tmp_path) -> None:
    assert main(["data", "prepare", *arguments(mine, tmp_path, "--shards=2")]) == 0
    path, index = tmp_path / "shard-00001-of-00002.arrayrecord", tmp_path / "index.json"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    place = whole.index(b"\xff\xd8\xff") + 200  # within the data of a JPEG
    flipped[place] ^= 0xFF
    path.write_bytes(bytes(flipped))
    samples, errors = open_shards(tmp_path), []
    for i in range(SAMPLES):
        try:
            samples[i]
        except DataError as error:
            errors.append(str(error))
    assert len(errors) == 1 and "shard-00001-of-00002.arrayrecord:" in errors[0] and "cannot be read" in errors[0]
    path.write_bytes(whole)
    samples = open_shards(tmp_path)
    assert samples[SAMPLES - 1].id
    (tmp_path / "new").write_bytes(whole)
    (tmp_path / "new").replace(path)  # under its name, and not over it
    assert samples[SAMPLES - 1].id
    samples = open_shards(tmp_path)
    assert samples[SAMPLES - 1].id
    path.write_bytes(bytes(flipped))
    os.utime(path, ns=(0, 0))  # the clock of the disk may be coarse
    with pytest.raises(SourceChangedError, match=r"shard-00001-of-00002.arrayrecord has changed since it was opened"):
        _ = samples[SAMPLES - 1]
    path.write_bytes(whole[:-1000])
    with pytest.raises(DataError, match=r"shard-00001-of-00002.arrayrecord has [\d,]+ bytes, not"):
        open_shards(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"shard-00001-of-00002.arrayrecord is missing; copy it again"):
        open_shards(tmp_path)
    text = index.read_text()
    for broken, message in (
        (text[:-20], "cannot be read"),
        ("[]", "is of format None, and this version reads 3"),
        (text.replace('"format": 2', '"format": 9'), "is of format 9"),
        (text.replace('"samples": 12', '"samples": 13'), "is damaged: it counts 24 samples"),
        (text.replace('"counts": "', '"counts": "0'), "counts.npz is not the one that index.json was written with"),
        (text.replace('"fingerprint"', '"finger"', 1), "is damaged"),
    ):
        index.write_text(broken)
        with pytest.raises(DataError, match=message):
            open_shards(tmp_path)


def test_a_set_of_an_earlier_version_is_read(mine, tmp_path) -> None:
    """Its index.json holds the counts."""
    assert main(["data", "prepare", *arguments(mine, tmp_path, "--shards=2")]) == 0
    new, path = open_shards(tmp_path).contents, tmp_path / "index.json"
    document = json.loads(path.read_text()) | {
        "format": 1,
        "tokens": new.tokens.tolist(),
        "images": new.images.tolist(),
    }
    path.write_text(json.dumps(document))
    (tmp_path / "counts.npz").unlink()
    old = open_shards(tmp_path).contents
    assert old.tokens.tolist() == new.tokens.tolist() and old.images.tolist() == new.images.tolist()


def test_threads_share_it(mine, tmp_path) -> None:
    assert main(["data", "prepare", *arguments(mine, tmp_path, "--shards=5")]) == 0
    samples, wrong = open_shards(tmp_path), []

    def read(offset: int) -> None:
        wrong.extend(i for i in range(100) if samples[(i + offset) % SAMPLES].id != f"s{(i + offset) % SAMPLES}")

    threads = [threading.Thread(target=read, args=(3 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_shards_in_a_bucket(mine, bucket, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["data", "prepare", *arguments(mine, "gs://bucket/mine", "--shards=2")]) == 0
    assert sorted(path.name for path in (bucket / "mine").iterdir()) == [
        "counts.npz", "index.json", "report.jsonl",
        "shard-00000-of-00002.arrayrecord", "shard-00001-of-00002.arrayrecord",
    ]  # fmt: skip
    samples = open_shards("gs://bucket/mine")
    assert not list(tmp_path.rglob("*.arrayrecord"))
    assert samples[1].id == "s1"
    assert [path.name for path in tmp_path.rglob("*.arrayrecord")] == ["shard-00000-of-00002.arrayrecord"]
    assert [sample.id for sample in pickle.loads(pickle.dumps(samples))] == [f"s{i}" for i in range(SAMPLES)]
    assert len(list(tmp_path.rglob("*"))) == 4  # two folders, two shards, no parts


def test_copies_of_a_bucket_s_shards_come_in_order_and_go_when_used(mine, bucket, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["data", "prepare", *arguments(mine, "gs://bucket/ahead", "--shards=6")]) == 0
    samples = open_shards("gs://bucket/ahead")
    block = [np.arange(start, start + 8) for start in (0, 8, 16)]  # two shards each
    room = sum(sorted((shard.bytes for shard in samples.contents.shards), reverse=True)[:4])

    def copies(expected: str) -> str:
        """The numbers of the shards that are copied, when they are those that are expected or in 10 s."""
        until = time.monotonic() + 10
        while True:
            found = "".join(sorted(path.name[10] for path in tmp_path.rglob("*.arrayrecord*")))
            if found == expected or time.monotonic() > until:
                return found
            time.sleep(0.05)

    samples.expect(block[0], block[1], room)
    assert copies("0123") == "0123"
    assert samples[0].id == "s0" and samples[23].id == "s23"  # one that was not expected takes another one's place
    assert len(copies("")) <= 4
    samples.expect(block[1], block[2], room)
    assert copies("2345") == "2345"
    assert not [link for link in Path("/proc/self/fd").iterdir() if "shard-00000" in str(link.resolve())]
    assert samples[3].id == "s3"  # late: it is copied once more
    with pytest.raises(DataError, match=r"room for 100 \(--config.data.cache_bytes\): raise it, or lower"):
        samples.expect(block[2], block[0], 100)


def test_a_tokenizer_in_a_bucket(demo, bucket, tmp_path) -> None:
    demo.save_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        (epath.Path("gs://bucket/tokenizer") / file.name).write_bytes(file.read_bytes())
    assert load_tokenizer("gs://bucket/tokenizer").get_vocab() == demo.get_vocab()
    with pytest.raises(DataError, match=r"'gs://bucket/nothing' is not a directory with a tokenizer"):
        load_tokenizer("gs://bucket/nothing")


@pytest.mark.multi_process
@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_workers_that_are_stopped(mine, tmp_path, how) -> None:
    """Two processes make what one makes; Ctrl-C, or a kill of the first, leaves none and a directory that goes on."""
    records = json.loads((mine / "train.json").read_text())
    (mine / "many.json").write_text(json.dumps(records * 50))
    argv = arguments(mine, tmp_path / "out", "--shards=30", file="many.json")
    command = [sys.executable, "-m", "saisa_jax", "data", "prepare", *argv, "--workers=2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 180
    while not list((tmp_path / "out").glob("*.arrayrecord")) and time.monotonic() < deadline:
        time.sleep(0.02)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does
    else:
        process.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), err
    while time.monotonic() < deadline and _alive(process.pid):
        time.sleep(0.05)
    assert not _alive(process.pid), "a worker is left"
    there = len(list((tmp_path / "out").glob("*.arrayrecord")))
    assert 0 < there < 30 and not (tmp_path / "out" / "index.json").exists()
    assert main(["data", "prepare", *argv]) == 0
    assert main(["data", "prepare", *arguments(mine, tmp_path / "one", "--shards=30", file="many.json")]) == 0
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert not list((tmp_path / "out").glob("*.part"))


def _alive(group: int) -> bool:
    """Whether any process of a group is there."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
