"""Flags that do not exist, and errors that are one line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from saisa_jax import __main__ as main
from saisa_jax.checkpoints import CheckpointError
from saisa_jax.cli.flags import find_recipe, read_config
from saisa_jax.cli.parser import Parser
from saisa_jax.config import ConfigError
from saisa_jax.convert.rows import ConvertError
from saisa_jax.data.sample import DataError
from saisa_jax.errors import UserError
from saisa_jax.report.runs import ReportError
from saisa_jax.training.loop import TrainingError
from saisa_jax.training.preemption import RunLockedError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "near"),
    [
        ("convert import --form=x --to=y", "there is no --form; did you mean --from"),
        ("convert export --from=x --layot=saisa --to=y", "there is no --layot; did you mean --layout"),
        ("convert inspect x --visoin y", "there is no --visoin; did you mean --vision"),
        ("chat --chekpoint=x", "there is no --chekpoint; did you mean --checkpoint"),
        ("flops --imags 3", "there is no --imags; did you mean --images"),
        ("plan --topologie=v5e:4x4", "there is no --topologie; did you mean --topology"),
        ("rows --stagee=finetune", "there is no --stagee; did you mean --stage"),
        ("report --work_dir=x", "there is no --work_dir; did you mean --workdir"),
    ],
)
def test_a_flag_that_does_not_exist(words: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main.main(words.split())
    assert stopped.value.code == 2 and near in capsys.readouterr().err


def test_beginnings_are_no_flags_and_what_follows_two_dashes_is_none() -> None:
    parser = Parser()
    parser.add_argument("--image")
    parser.add_argument("--image_size")
    parser.add_argument("words", nargs="*")
    assert parser.parse_args(["--image_size=3", "--", "--imag"]).words == ["--imag"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--image_s=3"])


def test_switches_are_spelled_as_absl_spells_them() -> None:
    parser = Parser()
    parser.add_switch("count", True, "count")
    parser.add_switch("dry_run", False, "start nothing")
    assert vars(parser.parse_args([])) == {"count": True, "dry_run": False}
    assert vars(parser.parse_args(["--nocount", "--dry_run"])) == {"count": False, "dry_run": True}


def test_a_recipe_and_its_settings() -> None:
    parser = Parser("train", recipe=True)
    parser.add_argument("--workdir")
    options, config = parser.parse_recipe(
        ["--workdir=x", "--config.seed", "3", "--config", "demo:llava", "--config.finetune.optimizer.lr=0.5"]
    )
    assert options.workdir == "x" and (config.seed, config.finetune.optimizer.lr) == (3, 0.5)
    assert config.model.alignment == "llava"
    with pytest.raises(ConfigError, match=r"--config is missing"):
        parser.parse_recipe(["--workdir=x"])


def test_recipes_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(find_recipe("demo")).read_bytes() == (ROOT / "configs" / "demo.py").read_bytes()
    assert find_recipe("saisa_vicuna_7b:finetune").endswith("saisa_vicuna_7b.py:finetune")
    assert read_config(["--config=saisa_vicuna_7b:finetune"]).stages == ("finetune",)  # it imports a neighbour
    (tmp_path / "demo").write_text("def get_config(): ...")
    assert find_recipe("demo") == "demo"  # a file comes first
    for wrong, hint in (("dmeo", "did you mean demo?"), ("configs/demo.py:llava", "did you mean demo?"), ("x", "demo")):
        with pytest.raises(ConfigError, match=rf"there is no recipe {wrong.partition(':')[0]}: .*{re.escape(hint)}"):
            find_recipe(wrong)
    with pytest.raises(ConfigError, match="there is no recipe common"):
        find_recipe("common")


@pytest.mark.parametrize(
    ("words", "shown", "said"),
    [
        ("flop", "bench image", "there is no verb 'flop'; did you mean flops?"),
        ("data inspct", "data prepare", "there is no verb 'data inspct'; did you mean data inspect?"),
        ("convrt import", "data prepare", "there is no verb 'convrt'; did you mean convert?"),
        ("", "data prepare", "bench data"),
        ("bench", "bench step", "bench data"),
    ],
)
def test_wrong_verbs_say_what_there_is_and_the_hint_last(
    words: str, shown: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(words.split()) == 2
    out, error = capsys.readouterr()
    assert not out and shown in error and said in error.splitlines()[-1]


def test_help_of_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--help"]) == 0
    overview = capsys.readouterr().out
    for verb in main.VERBS:
        try:
            assert main.main([*verb.split(), "--help"]) == 0
        except SystemExit as stopped:
            assert not stopped.code
        assert verb in overview and verb in capsys.readouterr().out
    assert main.main(["data", "--help"]) == 0
    assert "data inspect" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["", "--workdir=x --checkpoint=y", "--workdir=x --image=y", "--wrkdir=x"])
def test_eval_py_exits_with_2_for_wrong_usage(words: str) -> None:
    done = subprocess.run([sys.executable, "eval.py", *words.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "eval: error: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("words", ["", "--config=dmeo --workdir=x", "--config=demo", "--config=demo --workdir=x more"])
def test_train_py_exits_with_2_for_wrong_usage(words: str) -> None:
    done = subprocess.run([sys.executable, "train.py", *words.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--" in done.stderr and "Traceback" not in done.stderr


def test_every_error_that_a_user_can_mend_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in (CheckpointError, ConfigError, ConvertError, DataError, ReportError, RunLockedError, TrainingError):
        assert issubclass(kind, UserError)
    assert main.main(["convert", "inspect", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("convert: there is no nowhere; name a directory") and error.count("\n") == 1
