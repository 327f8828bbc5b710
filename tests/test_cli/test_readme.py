"""Every command of the README and the Makefile, run on the tiny configuration."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import saisa_jax
from saisa_jax.testing.checkpoints import write_checkpoint

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TINY = "saisa_jax/testing/configs.py"


def blocks(language: str) -> list[str]:
    """The README's code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands(prefix: str) -> list[str]:
    """The README's shell commands that begin with `prefix`, in order, without their comments."""
    lines = [line.split(" #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith(prefix)]


def make_commands(target: str) -> list[str]:
    """The Python commands that `make target` would run, as `python ...`."""
    out = subprocess.run(
        ["make", "-n", target], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    lines = out.stdout.replace("\\\n", " ").splitlines()
    return [line[line.index("python ") :] for line in lines if re.match(r"\S*bin/python (?!-m pip|-c)", line)]


def environment() -> dict[str, str]:
    """The caller's environment, with one device and without what `make` hands to its children."""
    kept = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "PYTHON", "TORCH")}
    return kept | {"XLA_FLAGS": re.sub(r"--xla_force_host_platform_device_count=\d+", "", kept["XLA_FLAGS"])}


def on_tiny(text: str, directory: Path) -> str:
    """The README's words with the tiny configuration, and with `directory` for `runs` and its picture."""
    text = text.replace("configs/demo.py", TINY).replace("picture.png", f"{directory}/picture.png")
    return text.replace("runs/", f"{directory}/").replace("weights/", f"{directory}/weights/")


def run(command: str, directory: Path) -> str:
    """Runs a command on the tiny configuration, with `directory` for `runs`; returns what it printed."""
    words = shlex.split(on_tiny(command, directory))
    assert words[0] == "python"
    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README calls `runs`, and its picture; a command finds there what those before it made."""
    path = tmp_path_factory.mktemp("runs")
    Image.new("RGB", (48, 32), "red").save(path / "picture.png")
    for name, layout in (("saisa", "saisa"), ("llm", "hf-llm"), ("encoder", "hf-vision")):
        write_checkpoint(path / "weights" / name, layout)
    return path


def test_the_snippet_that_makes_data(directory: Path) -> None:
    """Before the commands that read them."""
    _, snippet = blocks("python")
    exec(on_tiny(snippet, directory), {})


@pytest.mark.parametrize("command", commands("python "))
def test_python_command(command: str, directory: Path) -> None:
    out = run(command, directory)
    if "data inspect" in command:
        assert "what color is the shape?" in out and (directory / "mine" / "inspect.png").stat().st_size > 1000
    if "data prepare" in command:
        assert "64 samples with 64 images" in out
    if "flops" in command:
        assert "8.50" in out and "2.86" in out
    if "report" in command:
        assert (directory / "demo" / "report" / "index.html").stat().st_size > 1000


def test_the_snippet_that_asks(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snippet, _ = blocks("python")
    exec(on_tiny(snippet, directory), {})
    assert capsys.readouterr().out.startswith("[")


def test_make_demo_is_the_readmes_way_by_hand() -> None:
    assert make_commands("demo") == [line for line in commands("python ") if "=runs/demo" in line][:3]


@pytest.mark.slow
def test_make_demo_compare(tmp_path: Path) -> None:
    lines = make_commands("demo-compare")
    assert len(lines) == 11
    for line in lines:
        run(line, tmp_path)
    assert (tmp_path / "compare" / "report" / "index.html").exists()


def test_every_make_target_of_the_readme_exists() -> None:
    targets = [line.split()[-1] for line in commands("make ")]
    assert targets == ["demo", "test"]
    assert make_commands("test") == ["python -m pytest -n 2 --dist loadfile"]
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()


def test_version() -> None:
    assert f"## {saisa_jax.__version__} " in (ROOT / "CHANGELOG.md").read_text()
