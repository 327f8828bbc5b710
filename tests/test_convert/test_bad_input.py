"""What `convert` refuses: one message, exit status 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from saisa_jax.__main__ import main
from saisa_jax.testing.checkpoints import write_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bad") / "llm"
    write_checkpoint(directory, "hf-llm", shard_bytes=20_000)
    return directory


def edit(name: str, **changes: object) -> Callable[[Path], None]:
    def act(directory: Path) -> None:
        raw = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(raw | changes))

    return act


def truncate(directory: Path) -> None:
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])


def quantise(directory: Path) -> None:
    shard = sorted(directory.glob("*.safetensors"))[0]
    held = load_file(shard)
    save_file({key: value.view(np.int16) for key, value in held.items()}, shard)


def poison(directory: Path) -> None:
    for shard, value in zip(sorted(directory.glob("*.safetensors"))[:2], (np.inf, np.nan), strict=True):
        held = load_file(shard)
        name = min(held)
        changed = np.array(held[name])
        changed.reshape(-1)[-1] = value
        save_file({**held, name: changed}, shard)


def forget(directory: Path) -> None:
    file = directory / "model.safetensors.index.json"
    raw = json.loads(file.read_text())
    raw["weight_map"].pop("model.norm.weight")
    file.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "truncated"),
        (poison, "holds inf or NaN, with which no model can answer or be trained, in 2 tensors:"),
        (quantise, "is I16, expected a float"),
        (forget, "model.norm.weight (in model-"),
        (edit("config.json", num_hidden_layers=3), "missing     model.layers.2."),
        (edit("config.json", hidden_size=64), "misshaped"),
        (edit("config.json", model_type="gpt2"), "model_type='gpt2' is not known here; known: llama, mistral"),
        (lambda directory: (directory / "config.json").unlink(), "config.json is not there"),
        (lambda directory: (directory / "tokenizer.json").unlink(), "holds no tokenizer"),
    ],
)
def test_sources_that_do_not_fit(
    whole: Path, spoil: Callable[[Path], None], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(Path(shutil.copytree(whole, tmp_path / "in")))
    assert main(["convert", "import", f"--from={tmp_path / 'in'}", f"--to={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("convert: ") and message in error and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_targets_that_cannot_be_written(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    for to, message in (("file", "exists already"), ("full", "exists already"), ("file/below", "is a file")):
        assert main(["convert", "import", f"--from={whole}", f"--to={tmp_path / to}"]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    assert main(["convert", "import", f"--from={whole}", f"--to={tmp_path / 'new'}"]) == 2
    assert "the disk has 0.00 GB left" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    if os.geteuid():
        (tmp_path / "full").chmod(0o555)
        assert main(["convert", "import", f"--from={whole}", f"--to={tmp_path / 'full' / 'new'}"]) == 2
        assert "not writable" in capsys.readouterr().err


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "saisa_jax", "convert", *map(str, words)]


def test_a_disk_that_fills_up_while_it_is_written(whole: Path, tmp_path: Path) -> None:
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))  # noqa: E731
    done = subprocess.run(
        command("import", f"--from={whole}", f"--to={tmp_path / 'out'}"),
        cwd=ROOT, preexec_fn=limit, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pause", [0.0, 1.0])
def test_a_killed_import_leaves_nothing_that_looks_finished(whole: Path, tmp_path: Path, pause: float) -> None:
    """Killed as soon as its unfinished directory appears, or a little later; the same command then goes through."""
    words = command("import", f"--from={whole}", f"--to={tmp_path / 'out'}")
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / ".out.unfinished").exists():
        time.sleep(0.01)
    time.sleep(pause)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = (tmp_path / "out").exists()
    assert not finished or (tmp_path / "out" / "model.json").exists()
    if not finished:
        assert subprocess.run(words, cwd=ROOT, capture_output=True).returncode == 0
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
