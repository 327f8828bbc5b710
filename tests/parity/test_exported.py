"""What `convert export` writes, torch loads and computes the same with: as it was imported, and after training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from saisa_jax.__main__ import main
from saisa_jax.batch import Batch, empty_batch
from saisa_jax.checkpoints import copy_sidecar, load_model, save_model
from saisa_jax.config import ModelConfig
from saisa_jax.models.saisa import Saisa
from saisa_jax.testing.checkpoints import tiny_model, write_checkpoint

torch = pytest.importorskip("torch", reason="CPU torch is not installed")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

CLASSES = {
    "hf-llm": "AutoModelForCausalLM",
    "llava-hf": "LlavaForConditionalGeneration",
    "hf-vision": "CLIPVisionModel",
}
BEFORE, AFTER = np.arange(3, 9), np.arange(9, 40)  # text on both sides of the picture


def convert(*words: object) -> None:
    assert main(["convert", *map(str, words)]) == 0


def imported(root: Path, layout: str) -> Path:
    write_checkpoint(root / "in", layout)
    write_checkpoint(root / "tower", "hf-vision")
    convert("import", "--from", root / "in", "--vision", root / "tower", "--to", root / "ckpt", "--dtype", "float32")
    return root / "ckpt"


def trained(checkpoint: Path) -> Path:
    """The same model with every parameter changed, saved as training saves it."""
    random = np.random.default_rng(0)
    params, config, tokenizer, metadata = load_model(checkpoint)
    params = jax.tree.map(lambda x: x + 0.2 * random.standard_normal(x.shape, np.float32), params)
    to = checkpoint.parent / "trained"
    save_model(to, params, config, tokenizer, metadata, copy_sidecar(checkpoint))
    return to


@pytest.fixture(scope="module", params=["as imported", "trained"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA whose source was in another layout, so that every file is written from our configuration."""
    found = imported(tmp_path_factory.mktemp("exported"), "llava")
    return trained(found) if request.param == "trained" else found


def row(model: ModelConfig, with_image: bool) -> tuple[Batch, np.ndarray, np.ndarray]:
    """A row of text around a picture, the places of its text, and those of its visual tokens."""
    patches = model.vision.num_patches if with_image else 0
    tokens = np.concatenate([BEFORE, AFTER])
    batch = empty_batch(1, len(tokens), int(with_image), model.vision.image_size)
    places = np.arange(len(tokens)) + patches * (np.arange(len(tokens)) >= len(BEFORE))
    batch["tokens"][0], batch["positions"][0], batch["segment_ids"][0] = tokens, places, 1
    if with_image:
        batch["images"][:] = np.random.default_rng(1).integers(0, 256, batch["images"].shape)
        batch["image_positions"][0], batch["image_segment_ids"][0] = len(BEFORE), 1
    return batch, places, len(BEFORE) + np.arange(patches)


def ours(model: ModelConfig, params: Any, batch: Batch) -> np.ndarray:
    logits, _ = jax.jit(lambda p, b: Saisa(model).apply({"params": p}, b))(params, batch)
    return np.asarray(logits)[0, :, : model.vocab_size]


def pixels(model: ModelConfig, batch: Batch) -> Any:
    """The picture as torch wants it, [1, 3, height, width]."""
    mean, std = np.float32(model.vision.image_mean), np.float32(model.vision.image_std)
    return torch.tensor(((batch["images"][0] / np.float32(255) - mean) / std).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("layout", CLASSES)
def test_transformers_loads_it(checkpoint: Path, layout: str, tmp_path: Path, close: Callable[..., None]) -> None:
    convert("export", "--from", checkpoint, "--layout", layout, "--to", tmp_path / "out", "--dtype", "float32")
    load = getattr(transformers, CLASSES[layout]).from_pretrained
    theirs, loading = load(tmp_path / "out", output_loading_info=True)
    # The norm after the last layer has no say in the features; a tower without it is whole.
    assert all("post_layernorm" in key for key in loading["missing_keys"])
    assert not loading["unexpected_keys"] and not loading["mismatched_keys"]
    if layout == "hf-vision":
        transformers.AutoImageProcessor.from_pretrained(tmp_path / "out", use_fast=False)
        return
    params, config, *_ = load_model(checkpoint)
    batch, places, visual = row(config.model, layout == "llava-hf")
    ids = np.zeros(len(places) + len(visual), np.int64)
    ids[places] = batch["tokens"][0]
    picture = {}
    if layout == "llava-hf":
        ids[visual] = theirs.config.image_token_index
        picture = {"pixel_values": pixels(config.model, batch)}
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids[None]), **picture).logits[0].numpy()[places]
    close(ours(config.model, params, batch), expected, atol=1e-4)


@pytest.mark.parametrize("layout", ["hf-llm", "llava-hf"])
def test_a_tied_head_stays_tied(layout: str, tmp_path: Path, close: Callable[..., None]) -> None:
    """After training, also where the source held a second copy of it."""
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    model = dataclasses.replace(tiny_model("llava"), tie_embeddings=True)
    write_checkpoint(tmp_path / "in", layout, model)
    file = tmp_path / "in" / "model.safetensors"
    held = load_torch(file)
    embedding = next(key for key in held if key.endswith("embed_tokens.weight"))
    head = "lm_head.weight" if layout == "hf-llm" else "language_model.lm_head.weight"
    save_torch({**held, head: held[embedding].clone()}, file, {"format": "pt"})
    convert("import", "--from", tmp_path / "in", "--to", tmp_path / "ckpt", "--dtype", "float32")
    source = trained(tmp_path / "ckpt")
    convert("export", "--from", source, "--layout", layout, "--to", tmp_path / "out", "--dtype", "float32")
    theirs = getattr(transformers, CLASSES[layout]).from_pretrained(tmp_path / "out")
    assert theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    params, config, *_ = load_model(source)
    batch, *_ = row(config.model, False)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(batch["tokens"])).logits[0].numpy()
    close(ours(config.model, params, batch), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["as imported", "trained"])
def test_torch_reads_the_official_layout(kind: str, tmp_path: Path, close: Callable[..., None]) -> None:
    from safetensors.torch import load_file

    from tests.parity import torch_saisa

    source = imported(tmp_path, "saisa")
    source = trained(source) if kind == "trained" else source
    out = tmp_path / "out"
    convert("export", "--from", source, "--layout", "saisa", "--to", out, "--dtype", "float32")
    raw = json.loads((out / "config.json").read_text())
    assert raw["mm_vision_tower"] == str(out / "vision_tower")
    tower = transformers.CLIPVisionModel.from_pretrained(out / "vision_tower")
    params, config, *_ = load_model(source)
    batch, places, visual = row(config.model, True)
    with torch.no_grad():
        states = tower(pixels(config.model, batch), output_hidden_states=True).hidden_states
        expected = torch_saisa.logits(
            load_file(out / "model.safetensors"),
            raw,
            states[raw["mm_vision_select_layer"]][0, 1:],
            torch.tensor(batch["tokens"][0]),
            torch.tensor(places),
            torch.tensor(visual),
        )
    close(ours(config.model, params, batch), expected, atol=1e-4)


def test_a_llava_is_read_as_vica(tmp_path: Path, close: Callable[..., None]) -> None:
    from safetensors.torch import load_file

    from tests.parity import torch_saisa

    raw = write_checkpoint(tmp_path / "in", "llava", parts=("decoder", "projector"))
    write_checkpoint(tmp_path / "in" / "vision_tower", "hf-vision", dtype="F32")
    options = ["--layout", "llava", "--as", "saisa", "--visual_layers=1", "--frozen_prefix", "--dtype", "float32"]
    convert("import", "--from", tmp_path / "in", "--to", tmp_path / "ckpt", *options)
    params, config, *_ = load_model(tmp_path / "ckpt")
    batch, places, visual = row(config.model, True)
    _, seen = jax.jit(lambda p, b: Saisa(config.model).apply({"params": p}, b, capture=("features",)))(params, batch)
    weights = {key: held.float() for key, held in load_file(tmp_path / "in" / "model.safetensors").items()}
    features, tokens = torch.tensor(np.asarray(seen["features"])[0]), torch.tensor(batch["tokens"][0])
    expected = torch_saisa.logits(weights, raw, features, tokens, torch.tensor(places), torch.tensor(visual), vica=(1,))
    close(ours(config.model, params, batch), expected.detach(), atol=1e-4)


def test_the_restatement_in_torch_is_the_official_code(fixtures_dir: Path, close: Callable[..., None]) -> None:
    """On what the official code gave: else the test before this one would say little."""
    from safetensors.torch import load_file

    from tests.parity import torch_saisa

    directory = fixtures_dir / "saisa_tiny"
    raw, expected = json.loads((directory / "config.json").read_text()), load_file(directory / "expected.safetensors")
    picture = json.loads((directory / "expected.json").read_text())["prompts"]["p1"]["image"]
    ids = expected["p1.input_ids"]
    found = torch_saisa.logits(
        load_file(directory / "model.safetensors"),
        raw,
        expected[f"image_{picture}.vision_features"],
        ids[ids != -200],
        expected["p1.text_positions"],
        expected["p1.visual_positions"],
    )
    close(found.detach(), expected["p1.logits_text"], atol=1e-4)
