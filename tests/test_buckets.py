"""The whole life of a run in a bucket, bit for bit as on a disk; and the few things that are different there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image

import saisa_jax
from saisa_jax import buckets
from saisa_jax.__main__ import main
from saisa_jax.cli import convert
from saisa_jax.convert.rows import ConvertError
from saisa_jax.testing.checkpoints import write_checkpoint
from saisa_jax.testing.runs import ROOT, environment, outcome

PACKED = "--config=saisa_jax/testing/configs.py:packed"


def put(name: str, content: bytes) -> None:
    """What another host does, of which this process does not learn."""
    url = f"{os.environ['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/bucket/o?uploadType=media&name={name}"
    urllib.request.urlopen(urllib.request.Request(url, data=content)).close()


def test_files(bucket) -> None:
    there = buckets.absolute("gs://bucket/files/some")
    assert buckets.children(there) == [] == buckets.walk(there)
    buckets.remove(there)
    buckets.write_text(there / "a", "1\n")
    buckets.append_text(there / "a", "2\n")
    buckets.append_text(there / "b" / "c", "3\n")
    assert [path.name for path in buckets.children(there)] == ["a", "b"]
    assert (there / "a").read_text() == "1\n2\n"
    buckets.move(there, there.parent / "others")
    assert buckets.walk(there) == []
    assert [path.read_text() for path in buckets.walk(there.parent / "others")] == ["1\n2\n", "3\n"]
    put("files/others/d", b"4")  # by another host
    assert [path.name for path in buckets.children(there.parent / "others")] == ["a", "b", "d"]
    buckets.remove(there.parent / "others")
    assert not (there.parent / "others").exists()


def test_a_mirror_is_the_directory_itself_on_a_disk(tmp_path) -> None:
    with buckets.Mirror(epath.Path(tmp_path / "new")) as mirror:
        assert mirror.local == tmp_path / "new" and mirror.local.is_dir()
        mirror.upload()
    assert mirror.local.is_dir()


def test_a_mirror_brings_what_has_changed(bucket) -> None:
    folder = bucket
    there = buckets.place("gs://bucket/mirrored")
    with buckets.Mirror(there, ("rows",), seconds=1000) as mirror:
        (mirror.local / "rows").write_text("1\n")
        (mirror.local / "sub").mkdir()
        (mirror.local / "sub" / "x").write_bytes(b"x")
        mirror.upload(force=False)
        assert not (folder / "mirrored").exists()
        mirror.upload()
        stamp = (folder / "mirrored" / "sub" / "x").stat().st_mtime_ns
    assert not mirror.local.exists()
    with buckets.Mirror(there, ("rows", "none")) as mirror, (mirror.local / "rows").open("a") as file:
        file.write("2\n")
    assert (folder / "mirrored" / "rows").read_text() == "1\n2\n"
    assert (folder / "mirrored" / "sub" / "x").stat().st_mtime_ns == stamp


def test_import_and_export(bucket, tmp_path) -> None:
    """What comes back from a bucket is what comes back from a disk, the sidecar's files among it."""
    for name, layout in (("llm", "hf-llm"), ("encoder", "hf-vision")):
        write_checkpoint(tmp_path / name, layout)
    sources = [f"--llm={tmp_path / 'llm'}", f"--vision={tmp_path / 'encoder'}"]
    exports = []
    for place in ("gs://bucket/convert", str(tmp_path / "convert")):
        convert.main(["import", *sources, f"--to={place}/model"])
        for layout in ("hf-llm", "hf-vision"):
            convert.main(["export", f"--from={place}/model", f"--layout={layout}", f"--to={place}/{layout}"])
        files = buckets.walk(buckets.place(place) / "hf-llm") + buckets.walk(buckets.place(place) / "hf-vision")
        exports.append({os.fspath(file).removeprefix(place): file.read_bytes() for file in files})
    assert exports[0] == exports[1] and any(name.endswith(".safetensors") for name in exports[0])
    with pytest.raises(ConvertError, match="gs://bucket/convert/model exists already"):
        convert.main(["import", *sources, "--to=gs://bucket/convert/model"])
    model = saisa_jax.load("gs://bucket/convert/model")
    assert repr(model) == repr(saisa_jax.load(tmp_path / "convert" / "model")).replace(
        str(tmp_path / "convert"), "gs://bucket/convert"
    )


@pytest.mark.parametrize("where", ["bucket", "disk"])
def test_what_is_appended_stands_behind_what_was_there(where: str, bucket, tmp_path) -> None:
    path = buckets.place("gs://bucket/appended/rows" if where == "bucket" else tmp_path / "rows")
    buckets.write_text(path, "1\n")
    with pytest.raises(KeyboardInterrupt), buckets.appending(path) as append:
        append("2\n")
        append("3\n")
        raise KeyboardInterrupt
    assert path.read_text() == "1\n2\n3\n"


def test_what_is_not_served() -> None:
    with pytest.raises(buckets.BucketError, match="az:// is not served"):
        buckets.place("az://container/x")


def start(workdir: str, log: Path, *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "train.py", f"--workdir={workdir}", PACKED, *flags]
    with log.open("wb") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=file)


def until(process: subprocess.Popen[bytes], path: Path, log: Path, seconds: float = 240) -> None:
    """Returns when there is such a file."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def samples(root: Path) -> Path:
    """A LLaVA file of 24 samples with pictures."""
    (root / "images").mkdir()
    records, rng = [], np.random.default_rng(0)
    for i in range(24):
        question = {"from": "human", "value": "<image>\nwhat is the color of the shape?"}
        answer = {"from": "gpt", "value": ("red", "blue", "green")[i % 3]}
        records.append({"id": f"s{i}", "image": f"{i}.png", "conversations": [question, answer]})
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), np.uint8)).save(root / "images" / f"{i}.png")
    (root / "train.json").write_text(json.dumps(records))
    return root


def test_a_whole_life(bucket, tmp_path, capsys) -> None:
    """Prepared, trained, killed, stopped, resumed, evaluated and reported on, as on a disk."""
    folder, mine = bucket, samples(tmp_path)
    source = f"({{'path': '{mine}/train.json', 'images': '{mine}/images'}},)"
    for shards in (str(tmp_path / "shards"), "gs://bucket/shards"):
        argv = ["data", "prepare", PACKED, f"--config.finetune.sources={source}", "--shards=2", "--workers=1"]
        assert main([*argv, f"--output={shards}"]) == 0
        assert main([*argv, f"--output={shards}"]) == 0  # it is finished
    assert {path.name for path in (folder / "shards").iterdir()} == {
        path.name for path in (tmp_path / "shards").iterdir()
    }

    def flags(shards: str) -> tuple[str, ...]:
        return (
            f"--config.finetune.sources=({{'format': 'arrayrecord', 'path': '{shards}'}},)",
            "--config.pretrain.steps=4", "--config.training.checkpoint_every=2", "--config.training.keep_checkpoints=1",
        )  # fmt: skip

    log = tmp_path / "log"
    whole = start(str(tmp_path / "whole"), tmp_path / "whole.log", *flags(str(tmp_path / "shards")))
    run, ours = folder / "run", ("gs://bucket/run", log, *flags("gs://bucket/shards"))
    process = start(*ours)
    until(process, run / "pretrain" / "checkpoints" / "2" / "commit_success.txt", log)
    process.kill()
    process.wait()
    rows = [json.loads(line) for line in (run / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"][:2] == [1, 2]  # there before the checkpoint is
    (run / ".lease").unlink(missing_ok=True)  # or the next start waits for a minute: tests/test_training/test_lease.py

    process = start(*ours)
    until(process, run / "finetune" / "checkpoints" / "2" / "commit_success.txt", log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 128 + signal.SIGTERM, log.read_text()

    process = start(*ours)
    assert process.wait(300) == 0, log.read_text()
    assert "step 2/" not in log.read_text() and not (run / ".lease").exists()
    assert whole.wait(300) == 0, (tmp_path / "whole.log").read_text()
    for path in sorted(run.rglob("*"), reverse=True):  # the server keeps folders that it has emptied
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    there, here = outcome(run), outcome(tmp_path / "whole")
    for stage in here:
        for name in here[stage]._fields:
            assert getattr(there[stage], name) == getattr(here[stage], name), (stage, name)

    for workdir in ("gs://bucket/run", str(tmp_path / "whole")):
        assert main(["eval", f"--workdir={workdir}", "--limit=4"]) == 0
        assert main(["report", f"--workdir={workdir}"]) == 0
    assert sorted(path.name for path in (run / "report").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole" / "report").iterdir()
    )
    answers = [
        [json.loads(line) for line in (place / "evaluation" / "easy_vqa.jsonl").read_text().splitlines()]
        for place in (run, tmp_path / "whole")
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 4
