"""Flags that do not exist, and errors that are one line."""

from __future__ import annotations

import pytest

from saisa_jax import __main__ as main
from saisa_jax.checkpoints import CheckpointError
from saisa_jax.cli.parser import Parser
from saisa_jax.config import ConfigError
from saisa_jax.convert.rows import ConvertError
from saisa_jax.data.sample import DataError
from saisa_jax.errors import UserError
from saisa_jax.report.runs import ReportError
from saisa_jax.training.loop import TrainingError
from saisa_jax.training.preemption import RunLockedError


@pytest.mark.parametrize(
    ("words", "near"),
    [
        ("convert import --form=x --to=y", "there is no --form; did you mean --from"),
        ("convert export --from=x --layot=saisa --to=y", "there is no --layot; did you mean --layout"),
        ("convert inspect x --visoin y", "there is no --visoin; did you mean --vision"),
        ("chat --chekpoint=x", "there is no --chekpoint; did you mean --checkpoint"),
        ("flops --imags 3", "there is no --imags; did you mean --images"),
        ("report --work_dir=x", "there is no --work_dir; did you mean --workdir"),
    ],
)
def test_a_flag_that_does_not_exist(words: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main.main(words.split())
    assert stopped.value.code == 2 and near in capsys.readouterr().err


def test_what_argparse_takes_is_left_to_it() -> None:
    parser = Parser()
    parser.add_argument("--image")
    parser.add_argument("--image_size")
    parser.add_argument("words", nargs="*")
    assert parser.parse_args(["--image_s=3", "--", "--imag"]).words == ["--imag"]


def test_every_error_that_a_user_can_mend_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in (CheckpointError, ConfigError, ConvertError, DataError, ReportError, RunLockedError, TrainingError):
        assert issubclass(kind, UserError)
    assert main.main(["convert", "inspect", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("convert: there is no nowhere; name a directory") and error.count("\n") == 1
