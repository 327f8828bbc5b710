"""Compiled programs are kept from one process to the next, and told of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from saisa_jax import compilation
from saisa_jax.cli.parser import cache_choice

ROOT = Path(__file__).parents[1]

# A program of the command line that compiles one function and stops.
COMPILES = """
import sys
from saisa_jax import __main__, compilation

def main(argv):
    import jax, jax.numpy as jnp
    def _run_answer(x):
        return jnp.sin(x) @ x
    print(jax.jit(_run_answer)(jnp.ones((3, 3)))[0, 0])
    return 0

__main__.VERBS["eval"] = ("__main__", "this file")
compilation.Programs.__init__.__defaults__ = (None, 0.0)  # of what compiles in no time
__main__.program(["eval", *sys.argv[1:]])
"""


def run(*flags: str, **environment: str) -> str:
    """What the program says on stderr."""
    given = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "SAISA_"))}
    given |= {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILES, *flags],
        env=given | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout == "2.5244129\n", done.stderr
    return done.stderr


def test_the_second_process_finds_what_the_first_compiled(tmp_path: Path) -> None:
    first = run(XDG_CACHE_HOME=str(tmp_path))
    assert "compiled answer in" in first and "5 compiled, 0 from" in first, first
    (kept,) = (tmp_path / "saisa_jax" / "xla").iterdir()
    assert kept.stat().st_mode & 0o077 == 0 and any("answer" in file.name for file in kept.iterdir())
    second = run(XDG_CACHE_HOME=str(tmp_path))
    assert "answer came from the compilation cache" in second and f"0 compiled, 5 from {kept}" in second, second


def test_a_place_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = run(f"--compilation_cache={tmp_path / 'file' / 'cache'}")
    assert "compiled programs are not kept" in said and "--compilation_cache=DIR" in said and " from " not in said


@pytest.mark.parametrize(
    ("choice", "given", "enabled", "directory"),
    [
        ("", {}, None, "caches/saisa_jax/xla"),
        ("", {"JAX_COMPILATION_CACHE_DIR": "theirs"}, None, "theirs"),
        ("", {"SAISA_JAX_CACHE": "ours"}, None, "ours/xla"),
        ("", {"JAX_ENABLE_COMPILATION_CACHE": "0"}, "0", None),
        ("named", {"JAX_COMPILATION_CACHE_DIR": "theirs", "JAX_ENABLE_COMPILATION_CACHE": "false"}, "true", "named"),
        ("gs://bucket/xla", {}, "true", "gs://bucket/xla"),
        ("off", {}, "false", None),
    ],
)
def test_who_says_where(
    choice: str,
    given: dict[str, str],
    enabled: str | None,
    directory: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    environment = {"HOME": str(tmp_path), "XDG_CACHE_HOME": "caches", **given}
    monkeypatch.setattr(os, "environ", environment)
    compilation.keep_programs(choice)
    assert environment.get("JAX_ENABLE_COMPILATION_CACHE") == enabled
    seen = environment.get("JAX_COMPILATION_CACHE_DIR")
    assert (seen or "").startswith(directory or "") and (directory is None) == (seen is None)


def test_the_flag_is_read_before_the_verb() -> None:
    assert cache_choice(["eval", "--compilation_cache=there", "--limit", "3"]) == "there"
    assert cache_choice(["train", "--compilation_cache", "off", "--config.seed=1"]) == "off"
    assert cache_choice(["train", "--workdir=w", "--compilation_cache"]) == ""  # which the verb refuses
    assert cache_choice(["train", "--dry_run", "--topology=v5e:4x4", "--compilation_cache=there"]) == "off"


@pytest.mark.parametrize(
    ("name", "read"), [("jit(train_step)", "train step"), ("jit(_run_answer)", "answer"), ("jit(<lambda>)", "lambda")]
)
def test_programs_are_named_in_words(name: str, read: str) -> None:
    assert compilation.name_of({"fun_name": name}) == read
