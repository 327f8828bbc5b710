"""The verb `plan`: what is wrong with its flags is one line; with a TPU's compiler it plans."""

from __future__ import annotations

import pytest

from saisa_jax.__main__ import main

RECIPE = "--config=configs/saisa_vicuna_7b.py:finetune"
TINY = "--config=saisa_jax/testing/configs.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([RECIPE], "--topology is missing; for example --topology="),
        (["--topology=v5e:4x4"], "--config is missing"),
        ([RECIPE, "--topology=v5x:4x4"], "names no known chip; did you mean v5"),
        ([RECIPE, "--topology=v5e:4x4", "--config.mesh.fspd=4"], "did you mean --config.mesh.fsdp"),
        ([RECIPE, "--topology=v5e:4x4", "--config.mesh.fsdp=x"], "fsdp"),
        ([RECIPE + "s", "--topology=v5e:4x4"], "saisa_vicuna_7b.py:finetunes is unknown; known: pretrain, finetune"),
        ([RECIPE, "--topology=v5e:4x4", "more"], "unexpected arguments"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["plan", "--help"])
    assert "--topology" in capsys.readouterr().out


@pytest.mark.aot
def test_plan_of_the_tiny_model(capsys: pytest.CaptureFixture[str]) -> None:
    mesh = ["--config.mesh.data=1", "--config.mesh.fsdp=4"]
    assert main(["plan", TINY, "--topology=v5e:2x2", "--compare", "--samples=64", *mesh]) == 0
    said = capsys.readouterr().out
    assert "pretrain fits v5e:2x2" in said and "finetune fits v5e:2x2" in said
    assert "all-gather" in said and "llava" in said and "chip-hours" in said


@pytest.mark.aot
def test_two_slices(capsys: pytest.CaptureFixture[str]) -> None:
    """The gradients are all that goes from one to the other: no more than a float32 for each parameter of a device."""
    mesh = ["--config.mesh.dcn=2", "--config.mesh.data=2", "--config.mesh.fsdp=4", "--config.stages=finetune"]
    assert main(["plan", TINY, "--topology=v5e:2x2*2", *mesh]) == 0
    said = capsys.readouterr().out
    assert "finetune fits v5e:2x2*2" in said and "between slices: GiB a device receives" in said


@pytest.mark.aot
def test_what_does_not_fit_is_mended(capsys: pytest.CaptureFixture[str]) -> None:
    """Two layers of the width of 7B on one chip, in rows that need recomputation or parts."""
    arguments = [RECIPE, "--topology=v5e:2x2", "--config.model.num_layers=2", "--config.model.remat_policy=none"]
    rows = ["--config.finetune.batch_size=64", "--config.finetune.text_length=2048"]
    assert main(["plan", *arguments, *rows]) == 0
    said = capsys.readouterr().out
    assert "finetune does not fit v5e:2x2" in said and "it does with --config.model.remat_policy=full" in said
