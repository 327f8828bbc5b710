"""What goes out comes back as the same model: an encoder alone, small files, tensors in another layout."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from transformers import AutoImageProcessor, GenerationConfig

from saisa_jax.__main__ import main
from saisa_jax.checkpoints import copy_sidecar, load_model, save_model
from saisa_jax.config import ModelConfig
from saisa_jax.convert.configs import config_from_hf
from saisa_jax.convert.layouts import TOWER_PREFIX
from saisa_jax.convert.read import import_params
from saisa_jax.data.images import prepare_image
from saisa_jax.models.saisa import abstract_params
from saisa_jax.testing.checkpoints import write_checkpoint
from saisa_jax.testing.configs import tiny_config

DINO = {"family": "dinov2", "pre_norm": False, "patch_bias": True, "layer_scale": True}
SIGLIP = {"family": "siglip", "pre_norm": False, "class_token": False, "patch_bias": True}


def convert(*words: object) -> None:
    assert main(["convert", *map(str, words)]) == 0


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def random_params(model: ModelConfig) -> Any:
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), abstract_params(model))


@pytest.mark.parametrize(
    "changes",
    [
        {"select_layer": -2, "num_layers": 3, "image_mode": "pad"},
        {"select_layer": -1, "image_mode": "square"},
        {"select_layer": 1, "num_layers": 3, "image_mode": "resize"},
        {"select_layer": -1, "post_norm": True, "image_mode": "pad"},
        {"select_layer": -1, "post_norm": True, "image_mode": "pad", **DINO},
        {"select_layer": -2, "image_mode": "resize", **SIGLIP},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_an_encoder_alone_gives_the_same_features(changes: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config("saisa")
    vision = dataclasses.replace(config.model.vision, **changes)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vision=vision))
    params = random_params(config.model)
    save_model(tmp_path / "model", params, config, None, {"stage": "finetune"})
    convert("export", "--from", tmp_path / "model", "--layout", "hf-vision", "--to", tmp_path / "out")
    back = config_from_hf(tmp_path / "out", layout="hf-vision")
    used = {"num_layers": vision.num_used_layers, "select_layer": vision.num_used_layers}
    found = dataclasses.replace(back.vision, select_layer=back.vision.num_used_layers)
    assert found == dataclasses.replace(vision, **used)
    again = import_params(tmp_path / "out", back).params["vision"]
    jax.tree.map(np.testing.assert_array_equal, again, dict(params["vision"]))

    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 70, 3), dtype=np.uint8))
    ours = prepare_image(image, vision.image_size, vision.image_mode, vision.image_mean)
    ours = (ours / np.float32(255) - np.float32(vision.image_mean)) / np.float32(vision.image_std)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")
    theirs = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_an_encoder_without_a_preprocessor_gets_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "llm", "hf-llm")
    write_checkpoint(tmp_path / "tower", "hf-vision")
    (tmp_path / "tower" / "preprocessor_config.json").unlink()
    convert("import", "--llm", tmp_path / "llm", "--vision", tmp_path / "tower", "--to", tmp_path / "start")
    convert("export", "--from", tmp_path / "start", "--layout", "hf-vision", "--to", tmp_path / "alone")
    assert read(tmp_path / "alone" / "preprocessor_config.json")["do_pad"]
    convert("export", "--from", tmp_path / "start", "--layout", "saisa", "--to", tmp_path / "saisa")
    written = read(tmp_path / "saisa" / "vision_tower" / "preprocessor_config.json")
    assert written["image_processor_type"] == "CLIPImageProcessor" and "do_pad" not in written


@pytest.mark.parametrize("layout", ["saisa", "llava", "llava-hf"])
def test_a_frozen_tower_leaves_in_another_layout_bit_for_bit(layout: str, tmp_path: Path) -> None:
    """Stored in bfloat16 by training, in float32 in the files, and with a layer that is not used."""
    write_checkpoint(tmp_path / "in", layout, dtype="F32")
    if layout != "llava-hf":  # whose config.json describes its tower
        write_checkpoint(tmp_path / "in" / "vision_tower", "hf-vision")
    convert("import", "--from", tmp_path / "in", "--to", tmp_path / "ckpt")
    params, config, tokenizer, metadata = load_model(tmp_path / "ckpt")
    params["vision"] = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params["vision"])
    save_model(tmp_path / "trained", params, config, tokenizer, metadata, copy_sidecar(tmp_path / "ckpt"))
    for other in (layout, "hf-vision"):
        convert("export", "--from", tmp_path / "trained", "--layout", other, "--to", tmp_path / other)
    came, prefix = load_file(tmp_path / "in" / "model.safetensors"), TOWER_PREFIX[layout]
    same, alone = (load_file(tmp_path / other / "model.safetensors") for other in (layout, "hf-vision"))
    tower = {key.removeprefix(prefix): held for key, held in came.items() if key.startswith(prefix)}
    assert any(".layers.1." in key for key in tower)
    for found, expected in ((same, came), (alone, tower)):
        assert found.keys() == expected.keys()
        assert all(held.tobytes() == expected[key].tobytes() for key, held in found.items())
    assert config_from_hf(tmp_path / "hf-vision", layout="hf-vision").vision == config.model.vision


def test_a_frozen_decoder_that_was_rounded_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "in", "hf-llm", dtype="F16")
    convert("import", "--from", tmp_path / "in", "--to", tmp_path / "ckpt")
    params, config, tokenizer, metadata = load_model(tmp_path / "ckpt")
    for name, dtype in (("wide", jnp.float16), ("narrow", jnp.bfloat16)):
        held = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), params)
        save_model(tmp_path / name, held, config, tokenizer, metadata, copy_sidecar(tmp_path / "ckpt"))
        capsys.readouterr()
        convert("export", "--from", tmp_path / name, "--layout", "hf-llm", "--to", tmp_path / f"{name}-out")
        said = capsys.readouterr().out
        assert ("in bfloat16, which does not hold them to the bit" in said) == (name == "narrow")
        assert "STALE" not in said


GENERATION = {"eos_token_id": 2, "pad_token_id": 0, "temperature": 0.9, "top_p": 0.6}


@pytest.mark.parametrize("trained", [False, True])
def test_small_files_stay_as_they_came_until_they_say_something_else(trained: bool, tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_checkpoint(source, "hf-llm")
    (source / "generation_config.json").write_text(json.dumps(GENERATION))
    convert("import", "--from", source, "--to", tmp_path / "ckpt", "--template", "chatml")
    model = tmp_path / "ckpt"
    if trained:
        params, config, tokenizer, metadata = load_model(model)
        params["final_norm"]["scale"] += 1
        model = tmp_path / "trained"
        save_model(model, params, config, tokenizer, metadata, copy_sidecar(tmp_path / "ckpt"))
    convert("export", "--from", model, "--layout", "hf-llm", "--to", tmp_path / "out")
    for file in sorted(source.glob("*.json")):
        if not trained or file.name != "generation_config.json":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    if trained:  # chatml ends an answer with a token of its own
        said = read(tmp_path / "out" / "generation_config.json")
        end = load_model(model)[2].convert_tokens_to_ids("<|im_end|>")
        assert end in said["eos_token_id"] and said["pad_token_id"] == 0 and "temperature" not in said
        GenerationConfig.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "saved")


def test_a_tokenizer_from_elsewhere_is_the_one_that_goes_out(tmp_path: Path) -> None:
    for name in ("in", "other"):
        write_checkpoint(tmp_path / name, "hf-llm")
    other = tmp_path / "other" / "tokenizer_config.json"
    other.write_text(json.dumps(read(other) | {"model_max_length": 77}))
    convert("import", "--from", tmp_path / "in", "--tokenizer", tmp_path / "other", "--to", tmp_path / "ckpt")
    convert("export", "--from", tmp_path / "ckpt", "--layout", "hf-llm", "--to", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_bytes() == other.read_bytes()


@pytest.mark.parametrize("layout", ["saisa", "llava", "hf-llm"])  # llava-hf: tests/parity/test_exported.py
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_is_written_if_the_model_has_one(layout: str, tied: bool, tmp_path: Path) -> None:
    config = tiny_config("llava" if "llava" in layout else "saisa")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, tie_embeddings=tied))
    params = random_params(config.model)
    save_model(tmp_path / "model", params, config, None, {"stage": "finetune"})
    convert("export", "--from", tmp_path / "model", "--layout", layout, "--to", tmp_path / "out")
    assert read(tmp_path / "out" / "config.json")["tie_word_embeddings"] == tied
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in held) == (not tied)
    assert config_from_hf(tmp_path / "out").tie_embeddings == tied
