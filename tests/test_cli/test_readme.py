"""Every command of the README, the documentation and the Makefile, run on the tiny configuration."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

import saisa_jax
from configs.demo import VARIANTS
from saisa_jax.__main__ import main, verb_of
from saisa_jax.config import Config
from saisa_jax.testing.checkpoints import write_checkpoint
from saisa_jax.testing.runs import environment

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    *(f"docs/{name}.md" for name in ("index", "quickstart", "train", "data", "weights", "evaluate", "family")),
]
TINY = "saisa_jax/testing/configs.py"
# What a page may say besides Python and `python ...`: it is not run here.
NOT_RUN = ("make ", "pip install ", "python3 -m venv ")


class Step(NamedTuple):
    """One thing that a page tells its reader to do."""

    page: str
    language: str  # "bash": one command, without its comment; "python": a whole snippet
    text: str


def steps(page: str) -> list[Step]:
    """A page's commands and snippets, in their order."""
    found: list[Step] = []
    for language, block in re.findall(
        r"^```(bash|python)\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL
    ):
        if language == "python":
            found.append(Step(page, language, block))
        else:
            lines = (line.split(" #")[0].strip() for line in block.replace("\\\n", " ").splitlines())
            found += [Step(page, language, line) for line in lines if line and not line.startswith("#")]
    return found


def once(pages: Sequence[str]) -> list[Step]:
    """The steps of several pages without those that an earlier page has taken."""
    taken = {step.text: step for page in reversed(pages) for step in reversed(steps(page))}
    return [step for page in pages for step in steps(page) if taken[step.text] == step]


def commands(prefix: str) -> list[str]:
    """The README's shell commands that begin with `prefix`, in order."""
    return [step.text for step in steps("README.md") if step.language == "bash" and step.text.startswith(prefix)]


def make_commands(target: str) -> list[str]:
    """The Python commands that `make target` would run where nothing is made yet, as `python ...`."""
    out = subprocess.run(
        ["make", "-nB", target], cwd=ROOT, env=own_environment(), capture_output=True, text=True, check=True
    )
    lines = out.stdout.replace("\\\n", " ").splitlines()
    return [line[line.index("python ") :] for line in lines if re.match(r"\S*bin/python (?!-m pip|-c)", line)]


def own_environment() -> dict[str, str]:
    """One device, and nothing of what `make` hands to its children."""
    return {name: value for name, value in environment().items() if name not in ("MAKEFLAGS", "PYTHON", "TORCH")}


def on_tiny(text: str, directory: Path) -> str:
    """The README's words with the tiny configuration, and with `directory` for `runs` and its picture."""
    text = (
        text.replace("configs/demo.py", TINY)
        .replace("@1500", "@3")
        .replace("checkpoints/1500", "checkpoints/3")
        .replace("picture.png", f"{directory}/picture.png")
    )
    return text.replace("runs/", f"{directory}/").replace("weights/", f"{directory}/weights/")


def run(command: str, directory: Path) -> str:
    """Runs a command on the tiny configuration, with `directory` for `runs`; returns what it printed."""
    words = shlex.split(on_tiny(command, directory))
    assert words[0] == "python"
    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=ROOT,
        env=own_environment(),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages call `runs`, and their picture; a step finds there what those before it made."""
    path = tmp_path_factory.mktemp("runs")
    Image.new("RGB", (48, 32), "red").save(path / "picture.png")
    for name, layout in (("saisa", "saisa"), ("llava", "llava"), ("llm", "hf-llm"), ("encoder", "hf-vision")):
        write_checkpoint(path / "weights" / name, layout)
    return path


@pytest.mark.parametrize("step", once(PAGES), ids=lambda step: f"{step.page}: {step.text[:60]}")
def test_page(step: Step, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the pages' order: a step finds what those before it made."""
    if step.language == "python":
        if "AutoModel" in step.text:
            pytest.importorskip("torch", reason="CPU torch is not installed")
        exec(on_tiny(step.text, directory), {})
        if "saisa_jax.load" in step.text:
            assert capsys.readouterr().out.strip()
        return
    if step.text.startswith(NOT_RUN):
        return
    out = run(step.text, directory)
    if "data inspect" in step.text:
        assert "what color is the shape?" in out and (directory / "mine" / "inspect.png").stat().st_size > 1000
    if "data prepare" in step.text:
        assert "64 samples with 64 images" in out
    if "flops" in step.text:
        assert "8.50" in out and "2.86" in out
    if "report" in step.text:
        assert (directory / "demo" / "report" / "index.html").stat().st_size > 1000


ALL_PAGES = ["README.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/*.md")))]


@pytest.mark.parametrize("page", ALL_PAGES)
def test_what_a_page_names_exists(page: str) -> None:
    """Options of the configuration, recipes and files, also in the commands that need a TPU or a cluster."""
    text = (ROOT / page).read_text()
    for option in re.findall(r"--config\.([a-z_0-9.]+[a-z_0-9])", text):
        value: object = Config()
        for name in option.split("."):
            assert hasattr(value, name), f"{page}: --config.{option}"
            value = getattr(value, name)
    for recipe in re.findall(r"configs/\w+\.py", text):
        assert (ROOT / recipe).exists(), f"{page}: {recipe}"
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"


def all_commands(page: str) -> list[list[str]]:
    """The words after `saisa_jax` of every command of ours on a page, in blocks and within lines."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    found = [line.split(" #")[0] for line in text.splitlines()] + re.findall(r"`([^`\n]+)`", text)
    found = [re.sub(r"\bpython (train|eval)\.py", r"saisa_jax \1", line) for line in found]
    matches = [re.search(r"^(?:.* )?saisa_jax ([a-z].*)$", line.strip()) for line in found]
    return [match[1].split() for match in matches if match]


@pytest.mark.parametrize("page", ALL_PAGES)
def test_the_flags_of_a_command_exist(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of those that need a TPU, a cluster or an hour."""
    for words in all_commands(page):
        verb = verb_of(words)
        if verb is None:
            continue
        actions = [word for word in words if word in ("import", "export", "inspect")] if verb == "convert" else []
        with pytest.raises(SystemExit):
            main([*verb.split(), *actions[:1], "--help"])
        known = set(re.findall(r"--\w+", capsys.readouterr().out))
        given = {word.split("=")[0] for word in words if re.match(r"--(?!config\.)\w", word)}
        assert given <= known, f"{page}: {' '.join(words)}: {given - known}"


def test_make_demo_is_the_readmes_way_by_hand() -> None:
    assert make_commands("demo") == commands("python ")[:3]


@pytest.mark.slow
def test_make_demo_compare(tmp_path: Path) -> None:
    lines = make_commands("demo-compare")
    assert len(lines) == 12
    for line in lines:
        run(line, tmp_path)
    assert (tmp_path / "family" / "report" / "index.html").exists()
    assert "saisa-seed1 less saisa" in (tmp_path / "family" / "report" / "tables.md").read_text()


def test_make_demo_family_trains_every_variant_twice() -> None:
    config = "python train.py --config=configs/demo.py:"
    trained = [line.split(":")[1].split()[0] for line in make_commands("demo-family") if line.startswith(config)]
    assert sorted(trained) == sorted([*VARIANTS, *VARIANTS])


def test_every_make_target_of_the_readme_exists() -> None:
    targets = [line.split()[-1] for line in commands("make ")]
    assert targets == ["demo", "test"]
    assert make_commands("test") == ["python -m pytest -n 2 --dist loadfile"]
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()


def test_version() -> None:
    assert f"## {saisa_jax.__version__} " in (ROOT / "CHANGELOG.md").read_text()
