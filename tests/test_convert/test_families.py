"""A family of encoders or decoders of one's own: its module, if it computes otherwise, and one file."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from saisa_jax import presets
from saisa_jax.__main__ import main
from saisa_jax.checkpoints import load_model
from saisa_jax.convert.families import DECODERS, ENCODERS
from saisa_jax.convert.layouts import decoder_family
from saisa_jax.models import encoders
from saisa_jax.models.saisa import Saisa
from saisa_jax.testing.batches import IMAGE, make_batch
from saisa_jax.testing.checkpoints import tiny_model, write_checkpoint

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()


def example(heading: str) -> str:
    """The first piece of code below a heading of docs/extending.md."""
    return re.split(r"^```(?:python)?\n", PAGE.split(f"\n## {heading}\n")[1], flags=re.MULTILINE)[1]


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution that names its family as an entry point."""
    for registry in (ENCODERS, DECODERS, encoders.ENCODERS):
        monkeypatch.setattr(registry, "_entries", dict(registry))
        monkeypatch.setattr(registry, "_complete", False)
    monkeypatch.setattr(presets, "LLMS", presets.Presets(lambda: (f.presets for f in DECODERS.values())))
    root = tmp_path / "installed"
    metadata = root / "toys-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[saisa_jax.convert.families]\npooled = toy_family\nwide = toy_decoder\n"
        "[saisa_jax.models.encoders]\npooled = toy_module\n"
    )
    (root / "toy_module.py").write_text(example("A vision encoder"))
    (root / "toy_family.py").write_text(example("A family of encoders"))
    (root / "toy_decoder.py").write_text(example("A family of decoders"))
    monkeypatch.syspath_prepend(str(root))
    yield root
    for name in ("toy_module", "toy_family", "toy_decoder"):
        sys.modules.pop(name, None)


def convert(*words: object) -> None:
    assert main(["convert", *map(str, words)]) == 0


def pooled(directory: Path) -> dict[str, np.ndarray]:
    directory.mkdir()
    rng = np.random.default_rng(0)
    held = {
        "to_width.weight": rng.standard_normal((16, 3), np.float32),
        "to_width.bias": rng.standard_normal(16, np.float32),
        "classifier.weight": rng.standard_normal((2, 16), np.float32),
    }
    save_file(held, directory / "model.safetensors")
    raw = {"model_type": "pooled_pixels", "pixels": 24, "width": 16}
    (directory / "config.json").write_text(json.dumps(raw))
    return held


def test_an_encoder_of_ones_own_is_its_module_and_one_family_file(extensions: Path, tmp_path: Path) -> None:
    held = pooled(tmp_path / "encoder")
    write_checkpoint(tmp_path / "llm", "hf-llm")
    convert("import", "--llm", tmp_path / "llm", "--vision", tmp_path / "encoder", "--to", tmp_path / "start")
    params, config, *_ = load_model(tmp_path / "start")
    vision = config.model.vision
    assert (vision.kind, vision.family, vision.patch_size, vision.num_patches) == ("pooled", "pooled", 8, 9)
    np.testing.assert_array_equal(params["vision"]["colors"]["kernel"], held["to_width.weight"].T)
    model = dataclasses.replace(config.model_for("pretrain"), dtype="float32")
    batch = make_batch(model, [[IMAGE, 5, 6]])
    seen, _ = Saisa(model).apply({"params": jax.tree.map(lambda x: x.astype("float32"), params)}, batch)
    assert np.isfinite(seen[..., : model.vocab_size]).all()

    convert("export", "--from", tmp_path / "start", "--layout", "hf-vision", "--to", tmp_path / "same")
    assert {k: v.tobytes() for k, v in load_file(tmp_path / "same" / "model.safetensors").items()} == {
        k: v.tobytes() for k, v in held.items()
    }


def test_a_decoder_of_ones_own_is_one_family_file(extensions: Path, tmp_path: Path) -> None:
    raw = write_checkpoint(tmp_path / "llm", "hf-llm")
    (tmp_path / "llm" / "config.json").write_text(json.dumps(raw | {"model_type": "wide"}))
    convert("import", "--from", tmp_path / "llm", "--to", tmp_path / "ckpt")
    config = load_model(tmp_path / "ckpt")[1].model
    assert config.max_length == 123 and decoder_family(config).model_type == "wide"
    assert decoder_family(tiny_model("hf-llm")).model_type == "llama"
    assert presets.make("wide-1m", "clip-vit-l-336").embed_dim == 64


def test_an_unknown_family_is_answered_with_the_known_ones(tmp_path: Path, capsys: Any) -> None:
    pooled(tmp_path / "encoder")
    write_checkpoint(tmp_path / "llm", "hf-llm")
    words = ["import", f"--llm={tmp_path / 'llm'}", f"--vision={tmp_path / 'encoder'}", f"--to={tmp_path / 'start'}"]
    assert main(["convert", *words]) == 2
    assert "model_type='pooled_pixels' is not known here; known: clip_vision_model" in capsys.readouterr().err
