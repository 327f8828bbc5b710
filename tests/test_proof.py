"""The proof: its recipe, and all of its commands on something tiny."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from configs import proof
from configs.proof import VARIANTS, VICA_LAYERS, get_config
from proof.dinov2 import weights
from saisa_jax.config import Config, ConfigError, from_config_dict
from saisa_jax.presets import make
from saisa_jax.testing.configs import tiny_config

ROOT = Path(__file__).parents[1]
ROOT_OF_RUNS = "runs/elsewhere"


@pytest.fixture(autouse=True)
def start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model to start from, of which the recipe reads the configuration alone."""
    monkeypatch.setattr(proof, "read_account", lambda where: ({}, tiny_config()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_differs_in_the_model_alone(variant: str) -> None:
    config, saisa = (from_config_dict(Config, get_config(f"{name},{ROOT_OF_RUNS}")) for name in (variant, "saisa"))
    assert config.data.blind == (variant == "blind")
    for stage in ("pretrain", "finetune"):
        a, b = config.stage(stage), saisa.stage(stage)
        same = ("sources", "validation", "batch_size", "text_length", "max_images", "epochs", "optimizer", "groups")
        assert all(getattr(a, name) == getattr(b, name) for name in same)
    assert config.model.vision == saisa.model.vision and config.model.embed_dim == saisa.model.embed_dim
    assert config.stages == (("finetune",) if variant == "blind" else ("pretrain", "finetune"))


def test_data_is_drawings_or_features() -> None:
    config = from_config_dict(Config, get_config(f"saisa,{ROOT_OF_RUNS},features"))
    assert config.data.features and config.finetune.sources[0].path == f"{ROOT_OF_RUNS}/features/train"
    for wrong in ("sausa", f"saisa,{ROOT_OF_RUNS},pictures", f"saisa,{ROOT_OF_RUNS},features,more"):
        with pytest.raises(ConfigError, match=r"VARIANT\[,ROOT\[,DATA\]\]"):
            get_config(wrong)


def test_vica_sees_pictures_in_layers_that_smollm2_has() -> None:
    assert make("smollm2-135m", "dinov2-small").num_layers > max(VICA_LAYERS)


def test_weights_of_an_onnx_graph() -> None:
    """Named ones as they are, those of a MatMul transposed under its name, the table of positions by its shape."""
    rng = np.random.default_rng(0)
    named, product, other = (rng.random(shape, np.float32) for shape in ((4,), (4, 6), (4, 9)))
    of_class, table = rng.random((1, 1, 4), np.float32), rng.random((1, 25, 4), np.float32)
    constants = {"backbone.encoder.layer.0.mlp.fc1.bias": named, "onnx::MatMul_1": product, "onnx::MatMul_2": other}
    constants |= {"onnx::Expand_3": of_class, "table": table, "head.bias": named}
    scopes = {"/backbone/encoder/layer.0/mlp/fc1/MatMul": "onnx::MatMul_1", "/head/MatMul": "onnx::MatMul_2"}
    nodes = [SimpleNamespace(name=name, op_type="MatMul", input=["x", read]) for name, read in scopes.items()]
    nodes.append(SimpleNamespace(name="/backbone/encoder/layer.0/mlp/fc1/Add", op_type="Add", input=["head.bias"]))
    found = weights(constants, nodes, width=4, positions=25)
    assert found.keys() == {
        "encoder.layer.0.mlp.fc1.bias",
        "encoder.layer.0.mlp.fc1.weight",
        "embeddings.position_embeddings",
        "embeddings.mask_token",
    }
    np.testing.assert_array_equal(found["encoder.layer.0.mlp.fc1.weight"], product.T)
    np.testing.assert_array_equal(found["embeddings.position_embeddings"], np.concatenate([of_class, table], axis=1))


@pytest.mark.slow
def test_make_proof_smoke(tmp_path: Path) -> None:
    """The whole path, started twice: the second time nothing is trained again."""
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    for stamp in ("installed", "installed-proof"):
        (tmp_path / "venv" / stamp).touch()
    kept = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "PYTHON", "XLA_FLAGS")}
    out = tmp_path / "proof"
    command = ["make", "proof-smoke", f"VENV={tmp_path / 'venv'}", f"SMOKE={out}"]
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert "train.py" not in done.stdout and "eval.py" not in done.stdout
    tables = (out / "report/tables.md").read_text()
    for said in (*VARIANTS, "saisa-seed1", "saisa-text", "most frequent answer", "saisa less llava", "bit-equal"):
        assert said in tables
    for layout in ("saisa", "hf"):
        found = json.loads((out / "round-trip" / f"{layout}.json").read_text())
        assert found["bit_equal"] and found["same_answers"] and found["answers"] == 48
    page = (out / "report/index.html").read_text()
    assert "SAISA, low rank" in page and "measured" in page
