"""`pip install .` and an empty directory: the program, its help, and recipes by name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_an_installed_program_runs_in_an_empty_directory(tmp_path: Path) -> None:
    checkout, site, empty = tmp_path / "checkout", tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    shutil.copytree(
        ROOT, checkout, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv*", "tests", "runs", "build")
    )
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", site]
    subprocess.run([*install, checkout], check=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}

    def said(*words: str) -> str:
        command = [sys.executable, site / "bin" / "saisa_jax", *words]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert "data prepare" in said("--help")
    assert "--dry_run" in said("train", "--help") and "--checkpoint" in said("eval", "--help")
    assert "demo-llava" in said("train", "--dry_run", "--config=demo:llava")
    assert "2.86" in said("flops", "--model=vicuna-7b")
    where = [sys.executable, "-c", "import saisa_jax; print(saisa_jax.__file__)"]
    assert str(site) in subprocess.run(where, cwd=empty, env=environment, capture_output=True, text=True).stdout
    assert (site / "saisa_jax" / "configs" / "saisa_vicuna_7b.py").is_file()
    assert not (site / "configs").exists()
