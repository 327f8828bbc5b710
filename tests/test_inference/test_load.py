"""What `load` takes: a model, a run, somebody else's files; and the dtype that is computed in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import saisa_jax
from saisa_jax import flops
from saisa_jax.checkpoints import CheckpointError, save_model
from saisa_jax.config import ConfigError
from saisa_jax.data.sample import USER, Turn
from saisa_jax.inference import import_cache
from saisa_jax.inference.image_cache import EncodedImage
from saisa_jax.inference.model import dtype_name
from saisa_jax.testing.checkpoints import write_checkpoint


@pytest.fixture
def run(tiny_model, tmp_path: Path) -> Path:
    model = tiny_model("saisa")
    save_model(tmp_path / "run" / "finetune" / "model", model.params, model.config, model.tokenizer, model.metadata)
    return tmp_path / "run"


def test_a_run_is_its_last_finished_model(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saisa_jax.load(run)
    assert repr(model).startswith("VisionLanguageModel(tiny-saisa: saisa, ") and len(repr(model)) < 120
    assert "in float32, computed in float32)" in repr(model)
    monkeypatch.setenv("HOME", str(run.parent))
    assert import_cache.find_model("~/run") == str(run / "finetune" / "model")
    with pytest.raises(CheckpointError, match="nowhere"):
        saisa_jax.load(run / "nowhere")


def test_a_llava_is_switched_by_layers(tiny_model, run: Path, tmp_path: Path) -> None:
    """And answers; what an alignment does not have is an error."""
    llava = tiny_model("llava")
    save_model(tmp_path / "llava", llava.params, llava.config, llava.tokenizer, llava.metadata)
    model = saisa_jax.load(tmp_path / "llava", switches={"naavit_layers": (0,), "frozen_visual_layers": (1,)})
    assert model.model_config.visual_roles == ("mlp", "keys") and llava.model_config.visual_roles == ("queries",) * 2
    grey = np.full((32, 32, 3), 99, np.uint8)
    assert isinstance(model.generate("is it red?", grey, 2), str)
    assert flops.prefill(model.model_config, 16).total < flops.prefill(llava.model_config, 16).total
    with pytest.raises(ConfigError, match=r"frozen_visual_layers is a choice of model.alignment=llava, not of 'saisa'"):
        saisa_jax.load(run, switches={"frozen_visual_layers": (1,)})


def test_a_blind_model_leaves_pictures_out(run: Path) -> None:
    """Of a model that has seen them in training; the slots are empty, and the words are the same."""
    turns, grey = (Turn(USER, "is it red?"),), np.full((32, 32, 3), 99, np.uint8)
    slots = []
    for blind in (False, True):
        model = saisa_jax.load(run, blind=blind)
        batch = model.batch([model.request(turns, [EncodedImage.of(grey)], 1)])
        slots.append(np.asarray(batch["image_segment_ids"]).any())
        assert np.asarray(batch["segment_ids"]).any()
    assert slots == [True, False]


def test_a_bucket_is_no_local_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"gs://bucket/run/finetune/model/model.json"}
    monkeypatch.setattr("etils.epath.gpath.PosixGPath.exists", lambda path: str(path) in there)
    assert import_cache.find_model("gs://bucket/run") == "gs://bucket/run/finetune/model"
    assert import_cache.find_model("gs://bucket/run/finetune/model") == "gs://bucket/run/finetune/model"
    assert import_cache.find_model("gs://bucket/other") == "gs://bucket/other"


def test_foreign_files_are_imported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SAISA_JAX_CACHE", str(tmp_path / "cache"))
    write_checkpoint(tmp_path / "theirs", "llava-hf", dtype="F16")
    model = saisa_jax.load(tmp_path / "theirs")
    assert model.model_config.alignment == "llava" and model.model_config.dtype == "float16"
    assert "importing" in caplog.text and "once" in caplog.text
    (made,) = (tmp_path / "cache" / "imports").iterdir()
    before = made.stat().st_mtime_ns
    assert import_cache.find_model(tmp_path / "theirs") == str(made) and made.stat().st_mtime_ns == before
    weights = next((tmp_path / "theirs").glob("*.safetensors"))
    os.utime(weights, ns=(0, 0))  # another file, perhaps
    key = import_cache._key(tmp_path / "theirs")
    assert key not in made.name


@pytest.mark.parametrize("given", ["bfloat16", jnp.bfloat16, np.float32, np.dtype("float16")])
def test_dtypes_by_any_name(given: object) -> None:
    assert dtype_name(given) in ("bfloat16", "float32", "float16")


@pytest.mark.parametrize(
    ("given", "meant"), [("bf16", "bfloat16"), ("fp16", "float16"), ("torch.bfloat16", "bfloat16")]
)
def test_other_dtypes_name_the_one_that_was_meant(given: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"dtype='{given}' is not one of .*did you mean {meant}"):
        saisa_jax.load("nowhere", dtype=given)


def test_names_are_listed_before_they_are_used() -> None:
    names = "assert {'load', 'VisionLanguageModel'} <= set(dir(saisa_jax))"
    code = f"import sys, saisa_jax; {names}; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
