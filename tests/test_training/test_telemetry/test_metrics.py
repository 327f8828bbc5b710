"""Rows, events and progress of a run."""

import io
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from saisa_jax.training.telemetry.metrics import MetricsWriter, Progress, duration


def rows(directory):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def write_steps(directory, steps, **kwargs):
    with MetricsWriter(directory, **kwargs) as writer:
        for step in steps:
            writer.write("train", step, loss=1.0 / step)


def test_rows_are_on_disk_at_once_and_valid_json(tmp_path):
    with MetricsWriter(tmp_path / "new", tensorboard=False) as writer:
        writer.write("train", 1, loss=float("nan"), lr=np.float32(0.5), norm=float("-inf"), n=jnp.int32(3))
        assert rows(tmp_path / "new") == [{"kind": "train", "step": 1, "loss": None, "lr": 0.5, "norm": None, "n": 3}]
        writer.write(
            "eval",
            2,
            count=np.int64(4),
            loss=jnp.bfloat16(1.5),
            samples=[{"id": "a", "answer": "«yes»"}],
            layers=np.array([1.0, np.inf]),
            ok=np.bool_(True),
        )
        with pytest.raises(TypeError, match="a metric cannot be object"):
            writer.write("train", 3, loss=object())
    assert rows(tmp_path / "new")[1:] == [
        {
            "kind": "eval",
            "step": 2,
            "count": 4,
            "loss": 1.5,
            "samples": [{"id": "a", "answer": "«yes»"}],
            "layers": [1.0, None],
            "ok": True,
        }
    ]


def test_resume_cuts_back(tmp_path):
    write_steps(tmp_path, range(1, 8), tensorboard=False)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 3')  # cut short by a crash
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=4) as writer:
        assert [row["step"] for row in writer.cut] == [5, 6, 7]
    write_steps(tmp_path, [5, 6], tensorboard=False, resume_step=4)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write("goodput", 6, step_seconds=1.0)  # the run that goes on counts it and writes another one
    write_steps(tmp_path, [], tensorboard=False, resume_step=6)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    write_steps(tmp_path, [7], tensorboard=False)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    write_steps(tmp_path, [1], tensorboard=False, resume_step=0)
    assert [row["step"] for row in rows(tmp_path)] == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def events(directory):
    """[(kind of event, tag, step)] in the order written."""
    from tensorboardX.event_file_writer import EventFileWriter  # noqa: F401  (the package is there)
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((directory / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:  # length, its checksum, the event, its checksum
            length = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.HasField("session_log"):
                found.append(("start", "", event.step))
            found += [("scalar", value.tag, event.step) for value in event.summary.value]
    return found


def test_tensorboard(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 1, loss=0.5, ok=True, text="no number", nothing=float("nan"))
    assert events(tmp_path) == [("scalar", "train/loss", 1)]
    # Going on from step 4, after a kill that took events with it: all is written anew, and what was there is hidden.
    for path in (tmp_path / "tensorboard").iterdir():
        path.unlink()
    write_steps(tmp_path, [5], resume_step=4)
    assert events(tmp_path) == [("start", "", 0), ("scalar", "train/loss", 1), ("scalar", "train/loss", 5)]


def test_a_full_disk_hides_no_other_error(tmp_path, monkeypatch, caplog):
    def full():
        raise OSError(28, "No space left on device")

    with pytest.raises(KeyError), MetricsWriter(tmp_path) as writer:
        writer.write("train", 1, loss=0.5)
        monkeypatch.setattr(writer._events.file_writer.event_writer._ev_writer, "flush", full)
        raise KeyError
    assert "last events were not written: [Errno 28]" in caplog.text


def test_plain_lines():
    stream = io.StringIO()
    with Progress("pretrain", 100, 10, stream) as progress:
        progress.update(11, loss=2.5, lr=1e-3, grad_norm=12.345, process_memory_bytes=3 * 2.0**30, tokens=16.0)
        progress.update(
            20, loss=2.25, lr=1e-3, grad_norm=1.5, tokens=16.0, samples_per_second=12.34, tokens_per_second=2000.0,
            mfu=0.4123, hfu=0.5, data_wait=0.031, text_fill=0.94, image_fill=0.885, device_memory_bytes=1.26 * 2**30,
            seconds_left=480.0,
        )  # fmt: skip
        progress.update(30, loss=2.0, tflops_per_second=0.0123, seconds_left=39.0)
    assert stream.getvalue().splitlines() == [
        "pretrain: step 11/100  loss 2.5  lr 0.001  grad 12.3  3.0 GiB of memory  ? left",
        "pretrain: step 20/100  loss 2.25  lr 0.001  grad 1.5  12.3 samples/s  2,000 tokens/s  MFU 41.2%  HFU 50.0%  "
        "data wait 3%  text 94% full  images 88% full  1.3 GiB a device  8m 00s left",
        "pretrain: step 30/100  loss 2  12.3 GFLOP/s  39s left",
    ]


def test_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    progress = Progress("finetune", 100, 0, stream)
    progress.update(10, loss=0.25, samples_per_second=8.0, seconds_left=45.0)
    progress.close()
    progress.close()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "10/100" in text
    assert "loss 0.25  8 samples/s" in text
    assert "45s left" in text


def test_duration():
    assert [duration(seconds) for seconds in (0.2, 59.6, 125, 7385, -1)] == ["0s", "1m 00s", "2m 05s", "2h 03m", "0s"]
