"""What `convert export` writes, transformers' own PyTorch classes load, and compute the same with it."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from saisa_jax.__main__ import main
from saisa_jax.batch import empty_batch
from saisa_jax.checkpoints import load_model
from saisa_jax.models.saisa import Saisa
from saisa_jax.testing.checkpoints import write_checkpoint

torch = pytest.importorskip("torch", reason="CPU torch is not installed")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

CLASSES = {
    "hf-llm": "AutoModelForCausalLM",
    "llava-hf": "LlavaForConditionalGeneration",
    "hf-vision": "CLIPVisionModel",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA whose source was in another layout, so that every file is written from our configuration."""
    root = tmp_path_factory.mktemp("exported")
    write_checkpoint(root / "in", "llava")
    write_checkpoint(root / "tower", "hf-vision")
    words = ["import", "--from", root / "in", "--vision", root / "tower", "--to", root / "ckpt", "--dtype", "float32"]
    assert main(["convert", *map(str, words)]) == 0
    return root / "ckpt"


@pytest.mark.parametrize("layout", CLASSES)
def test_transformers_loads_it(checkpoint: Path, layout: str, tmp_path: Path) -> None:
    words = ["export", "--from", checkpoint, "--layout", layout, "--to", tmp_path / "out", "--dtype", "float32"]
    assert main(["convert", *map(str, words)]) == 0
    load = getattr(transformers, CLASSES[layout]).from_pretrained
    theirs, loading = load(tmp_path / "out", output_loading_info=True)
    # The norm after the last layer has no say in the features; a tower without it is whole.
    assert all("post_layernorm" in key for key in loading["missing_keys"])
    assert not loading["unexpected_keys"] and not loading["mismatched_keys"]
    if layout == "hf-vision":
        transformers.AutoImageProcessor.from_pretrained(tmp_path / "out", use_fast=False)
        return
    params, config, *_ = load_model(checkpoint)
    tokens = np.arange(3, 40)
    batch = empty_batch(1, len(tokens), 0, config.model.vision.image_size)
    batch["tokens"][0], batch["positions"][0], batch["segment_ids"][0] = tokens, np.arange(len(tokens)), 1
    logits, _ = jax.jit(lambda p, b: Saisa(config.model).apply({"params": p}, b))(params, batch)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(tokens[None])).logits[0].numpy()
    np.testing.assert_allclose(np.asarray(logits)[0, :, : config.model.vocab_size], expected, rtol=0, atol=1e-4)
