"""Counting in parts: by workers, by several processes, stopped, killed and gone on with."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from saisa_jax.config import SourceConfig
from saisa_jax.data.rows import counting
from saisa_jax.data.rows.counting import CountingStopped, Effort, Part, count, counted
from saisa_jax.data.sources import open_source
from saisa_jax.data.text.encoder import Encoder
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.testing.configs import packed_config

SAMPLES, PART = 50, 8
MISSING = (3, 20, 21, 45)  # pictures that are not there
EMPTY = 30  # its answer


@pytest.fixture
def source(tmp_path) -> SourceConfig:
    """50 samples of 1 to 7 words; the pictures lie in two folders."""
    for folder in "ab":
        (tmp_path / "images" / folder).mkdir(parents=True)
    records = []
    for n in range(SAMPLES):
        name = f"{'ab'[n % 2]}/{n}.png"
        if n not in MISSING:
            (tmp_path / "images" / name).touch()
        answer = "" if n == EMPTY else " ".join(["red"] * (1 + n % 7))
        said = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": answer}]
        records.append({"id": f"s{n}", "image": name, "conversations": said})
    (tmp_path / "data.json").write_text(json.dumps(records))
    return SourceConfig("llava", path=str(tmp_path / "data.json"), images=str(tmp_path / "images"))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch) -> None:
    monkeypatch.setattr(counting, "PART", PART)


def make_encoder(on_error: str = "raise") -> Encoder:
    config = packed_config()
    data = dataclasses.replace(config.data, on_error=on_error, max_drop=0.5)
    return Encoder(dataclasses.replace(config, data=data), "finetune", load_tokenizer("easy_vqa"))


def assert_same(one: Part, two: Part) -> None:
    for field in dataclasses.fields(Part):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(two, field.name), field.name)


@pytest.fixture
def numbers(monkeypatch) -> list[int]:
    """The samples that this process counts, as it counts them."""
    seen: list[int] = []
    real = counting.count

    def recorded(samples, encoder, numbers=None, *rest):
        seen.extend(range(len(samples)) if numbers is None else numbers.tolist())
        return real(samples, encoder, numbers, *rest)

    monkeypatch.setattr(counting, "count", recorded)
    return seen


def after(calls: int):
    """True when it has been asked so often."""
    left = iter(range(calls))
    return lambda: next(left, None) is None


KILLED = """
import sys
if __name__ == "__main__":  # not in the workers
    import test_counting as t
    t.counting.PART = t.PART
    path, kept = sys.argv[1:]
    source = t.SourceConfig("llava", path=f"{path}/data.json", images=f"{path}/images")
    write = t.counting._write
    def write_and_wait(path, part, on_error):
        write(path, part, on_error)
        if path.name == "00002.npz":
            print("counted", flush=True)
            t.time.sleep(60)
    t.counting._write = write_and_wait
    t.counted(t.open_source(source), t.make_encoder(), t.Effort(workers=2), t.epath.Path(kept))
"""


def test_a_killed_one_goes_on(source, tmp_path, numbers) -> None:
    """Two workers count; all are killed with what they had begun. The next start counts what is not kept, and it is
    what one process counts alone."""
    kept, script = tmp_path / "counts-0.npz", tmp_path / "killed_counting.py"
    script.write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    child = subprocess.Popen(
        [sys.executable, script, tmp_path, kept], env=environment, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == "counted\n"
    child.kill()
    child.wait()
    there = sorted(int(path.stem) for path in (tmp_path / "counts-0.parts").glob("[0-9]*.npz"))
    assert 2 in there and not kept.exists()
    for _ in range(100):
        try:
            os.killpg(child.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("workers outlive the process that started them")
    part = counted(open_source(source), make_encoder(), Effort(), epath.Path(kept))
    missing = [n for n in range(SAMPLES) if n // PART not in there]
    assert numbers == [*missing, *MISSING]  # what could not be used is looked at again
    assert_same(part, count(open_source(source), make_encoder()))
    assert sorted(path.name for path in tmp_path.glob("counts*")) == ["counts-0.npz"]


def test_processes_count_a_share_each(source, tmp_path, numbers, monkeypatch) -> None:
    """What the others have counted is taken from them; what they have not, is counted when the own share is done."""
    kept, samples = epath.Path(tmp_path / "counts-0.npz"), open_source(source)
    alone = count(samples, make_encoder())
    monkeypatch.setattr(counting, "_SECONDS_TO_STOP", 0)
    with pytest.raises(CountingStopped):  # the first process ends after its share, of 3 of 7 parts
        counted(samples, make_encoder(), Effort(0, 2, stopped=after(3 * PART)), kept)
    assert numbers[: 3 * PART] == list(range(3 * PART))
    del numbers[:]
    part = counted(samples, make_encoder(), Effort(1, 2), kept)
    assert numbers[: SAMPLES - 3 * PART] == list(range(3 * PART, SAMPLES))
    assert numbers[SAMPLES - 3 * PART :] == list(MISSING)  # looked at once more
    assert_same(part, alone)
    del numbers[:]
    counted(samples, make_encoder(), Effort(0, 2), kept)  # started again: all of it is there
    assert set(numbers) <= set(MISSING)


def test_a_process_alone_counts_all_shares(source, tmp_path, numbers) -> None:
    part = counted(open_source(source), make_encoder(), Effort(1, 3), epath.Path(tmp_path / "counts-0.npz"))
    assert sorted(numbers) == list(range(SAMPLES)) and len(part.tokens) == SAMPLES
    assert numbers[:PART] == list(range(2 * PART, 3 * PART))


def test_what_cannot_be_used_is_looked_at_again(source, tmp_path, numbers) -> None:
    """That alone: with raise always; with drop once, so that a run goes on with the rows that it began with."""
    kept, samples = epath.Path(tmp_path / "counts-0.npz"), open_source(source)

    def start(on_error: str) -> tuple[list[int], list[int]]:
        del numbers[:]
        part = counted(samples, make_encoder(on_error), Effort(), kept)
        assert part.empty == 1 and part.tokens[EMPTY] == 0
        return sorted(numbers), part.unusable.tolist()

    assert start("raise") == (list(range(SAMPLES)), list(MISSING))
    (tmp_path / "images" / "b" / "3.png").touch()  # supplied after the error
    assert start("drop") == (list(MISSING), [20, 21, 45])
    (tmp_path / "images" / "a" / "20.png").touch()
    assert start("drop") == ([], [20, 21, 45])
    assert start("raise") == ([20, 21, 45], [21, 45])


def test_the_disk_is_asked_once_for_each_folder(source, monkeypatch) -> None:
    """By a listing: questions about files do not grow with the samples, but for those that are missing."""
    samples, encoder = open_source(source), make_encoder()
    asked: list[str] = []
    for name in ("stat", "lstat", "listdir", "readlink", "scandir"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, _real=real, _name=name, **k: asked.append(_name) or _real(*a, **k))
    good = np.array([n for n in range(SAMPLES) if n not in MISSING])
    assert len(count(samples, encoder, good).unusable) == 0
    assert asked == ["listdir", "listdir"]


def test_a_run_is_stopped_while_it_counts(source, tmp_path, monkeypatch, caplog) -> None:
    """SIGTERM: the usual exit, and the next start goes on from the part that was not finished."""
    from saisa_jax.training import loop

    for n in MISSING:
        (tmp_path / "images" / "ab"[n % 2] / f"{n}.png").touch()
    config = packed_config()
    stage = dataclasses.replace(config.finetune, sources=(source,), validation=(), steps=1)
    config = dataclasses.replace(config, stages=("finetune",), finetune=stage, allow_random_init=True)
    monkeypatch.setattr(counting, "_SECONDS_TO_STOP", 0)
    whole, calls = Encoder.whole, []

    def interrupted(self, sample, rng=None):
        calls.append(sample.id)
        if calls.count("s19") == 2:  # the first time it was looked at for unknown words
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, sample, rng)

    monkeypatch.setattr(Encoder, "whole", interrupted)
    with caplog.at_level("WARNING", "absl"):
        assert loop.run(config, epath.Path(tmp_path / "run")) == signal.SIGTERM
    assert "of 50 samples were counted; the same command goes on from there" in caplog.text
    (folder,) = (tmp_path / "run" / "finetune").glob("counts-*.parts")
    assert sorted(path.name for path in folder.iterdir()) == ["00000.npz", "00001.npz"]
