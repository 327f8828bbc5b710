"""What is measured of the layers, from the command line: on a model that hides the picture from one of its layers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from saisa_jax.__main__ import main
from saisa_jax.checkpoints import save_model
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.models.saisa import init_params
from saisa_jax.testing.configs import tiny_config


def test_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=3, visual_layers=(0, 2)))
    params = init_params(config.model, jax.random.key(1))
    save_model(tmp_path / "model", params, config, load_tokenizer("easy_vqa"), {"stage": "finetune"})
    command = ["layers", f"--checkpoint={tmp_path / 'model'}", "--limit=3", "--batch_size=2"]
    assert main([*command, "--keep=3"]) == 2
    assert "--keep=3 is not a number of layers that see the picture: 1 to 2" in capsys.readouterr().err
    assert main([*command, "--keep=2", f"--output={tmp_path / 'out'}"]) == 0
    assert "model.visual_layers=0,2: with the picture hidden" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "layers.json").read_text())
    attention, divergence = np.asarray(found["attention"]), np.asarray(found["divergence"])
    assert divergence[1] == attention[1] == 0 and (divergence[[0, 2]] > 1e-7).all()
    assert (attention[[0, 2]] > 0.05).all() and (attention < 1).all()
    assert found["proposal"] == [0, 2] and abs(found["kept"]) < 1e-6 < found["blind"]
    assert found["questions"] == 3 <= found["tokens"]
    assert found["prefill_flops"]["proposed"] < found["prefill_flops"]["this"]
    assert (tmp_path / "out" / "layers.png").read_bytes().startswith(b"\x89PNG")
