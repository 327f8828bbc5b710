"""Exports in the layout saisa, read by the rules of the official program (icip-cas/SAISA, with transformers 4.37)."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from saisa_jax.__main__ import main
from saisa_jax.batch import empty_batch
from saisa_jax.checkpoints import copy_sidecar, load_model, save_model
from saisa_jax.config import RopeScalingConfig
from saisa_jax.convert import import_checkpoint
from saisa_jax.convert.files.hub import resolve
from saisa_jax.convert.official import official_notes, spell_for_transformers_4
from saisa_jax.data.text.tokenizer import train_tokenizer
from saisa_jax.models.saisa import Saisa, share_to_per_layer
from saisa_jax.testing.checkpoints import tiny_model, write_checkpoint
from saisa_jax.testing.tokenizers import byte_level, sentence_piece

WORDS = ["what color is the shape in the picture? the shape is red and round.", "A square, a circle: blue!"] * 20
FACTOR = 2.0


def convert(*words: object) -> None:
    assert main(["convert", *map(str, words)]) == 0


def write_slow_tokenizer(directory: Path) -> None:
    """As Vicuna's: `tokenizer.model`, and no tokenizer.json."""
    (directory / "tokenizer.json").unlink()
    model = io.BytesIO()
    ids = {"unk_id": 0, "bos_id": 1, "eos_id": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS), model_writer=model, vocab_size=100, model_type="bpe", minloglevel=2, **ids
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "special_tokens_map.json").write_text(json.dumps(special))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with a tower of 1024 numbers a patch in float32, as training starts from it."""
    root = tmp_path_factory.mktemp("official")
    model = tiny_model("hf-llm")
    vision = dataclasses.replace(model.vision, embed_dim=1024, num_heads=4, image_mode="pad", activation="quick_gelu")
    model = dataclasses.replace(model, vision=vision, rope_scaling=RopeScalingConfig("linear", factor=FACTOR))
    write_checkpoint(root / "llm", "hf-llm", model)
    write_slow_tokenizer(root / "llm")
    (root / "llm" / "notes.json").write_text("{}")
    (root / "llm" / "LICENSE.txt").write_text("as you like")
    write_checkpoint(root / "tower", "hf-vision", model, dtype="F32")
    return root


def import_start(root: Path, to: Path, tower: object) -> Path:
    convert("import", "--llm", root / "llm", "--vision", tower, "--to", to)
    return to


def pretrained(source: Path, to: Path, tower: float = 0.0) -> Path:
    """As stage 1 leaves it: all but the projector in bfloat16; `tower`: what its training added to the tower."""
    params, config, tokenizer, metadata = load_model(source)
    frozen = {name: part for name, part in params.items() if name != "visual_proj"}
    frozen = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), frozen)
    frozen["vision"] = jax.tree.map(lambda leaf: leaf + tower, frozen["vision"])
    trained = {"visual_proj": jax.tree.map(lambda leaf: leaf + 0.1, params["visual_proj"])}
    save_model(to, frozen | trained, config, tokenizer, metadata, copy_sidecar(source))
    return to


def official(directory: Path) -> tuple[dict[str, Any], sentencepiece.SentencePieceProcessor, str]:
    """What `load_pretrained_model` of the official program makes of a folder, from whatever directory it runs in."""
    assert "saisa" in str(directory).strip("/").split("/")[-1].lower()
    raw = json.loads((directory / "config.json").read_text())
    scaling = raw.get("rope_scaling")
    assert scaling is None or (len(scaling) == 2 and scaling["type"] in ("linear", "dynamic"))
    assert scaling is None or (isinstance(scaling["factor"], float) and scaling["factor"] > 1)
    slow = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    tower = raw["mm_vision_tower"]
    assert os.path.exists(tower) or tower.startswith(("openai", "laion")) or "ShareGPT4V" in tower
    return raw, slow, tower


def bits(directory: Path) -> dict[str, tuple[str, bytes]]:
    return {key: (str(held.dtype), held.tobytes()) for key, held in load_file(directory / "model.safetensors").items()}


@pytest.mark.parity
def test_stage_1_runs_from_anywhere(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch", reason="CPU torch is not installed")
    from safetensors.torch import load_file as load_torch
    from transformers import CLIPImageProcessor, CLIPVisionModel

    from tests.parity import torch_saisa

    source = import_start(start, tmp_path / "start", start / "tower")
    trained = pretrained(source, tmp_path / "trained")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    convert("export", "--from", trained, "--layout", "saisa", "--to", "../saisa-out")
    said = capsys.readouterr().out
    assert "STALE" not in said and "does not run" not in said and "say so there if you move" in said

    out = tmp_path / "saisa-out"
    raw, slow, tower = official(out)
    assert bits(Path(tower)) == bits(start / "tower")  # frozen, and stored in bfloat16 meanwhile
    assert (out / "tokenizer.model").read_bytes() == (start / "llm" / "tokenizer.model").read_bytes()
    assert (out / "LICENSE.txt").read_text() == "as you like"
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels = CLIPImageProcessor.from_pretrained(tower)(picture, return_tensors="pt")["pixel_values"]
    before, after = np.asarray([1, *slow.encode("what color")]), np.asarray(slow.encode("is the shape?"))
    patches = tiny_model("saisa").vision.num_patches
    places = np.concatenate([np.arange(len(before)), len(before) + patches + np.arange(len(after))])
    visual = len(before) + np.arange(patches)
    with torch.no_grad():
        states = CLIPVisionModel.from_pretrained(tower)(pixels, output_hidden_states=True).hidden_states
        features = states[raw["mm_vision_select_layer"]][0, 1:]
        weights = {key: held.float() for key, held in load_torch(out / "model.safetensors").items()}
        text = torch.tensor(np.concatenate([before, after]))
        scaled = [torch.tensor(where / raw["rope_scaling"]["factor"]) for where in (places, visual)]
        theirs = torch_saisa.logits(weights, raw, features, text, *(where.float() for where in scaled)).numpy()

    params, config, *_ = load_model(trained, dtype="float32")
    model = dataclasses.replace(config.model_for("finetune"), dtype="float32")
    params = share_to_per_layer(params | {"vision": load_model(source)[0]["vision"]}, model)
    batch = empty_batch(1, len(text), 1, model.vision.image_size)
    batch["tokens"][0], batch["positions"][0], batch["segment_ids"][0] = text.numpy(), places, 1
    batch["images"][0, 0], batch["image_positions"][0], batch["image_segment_ids"][0] = picture, len(before), 1
    logits, _ = jax.jit(lambda p, b: Saisa(model).apply({"params": p}, b))(params, batch)
    np.testing.assert_allclose(np.asarray(logits)[0, :, : model.vocab_size], theirs, rtol=0, atol=1e-4)


def test_a_tower_of_the_hub_stays_there_until_it_is_trained(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "openai/clip-tiny"
    local = lambda source, *rest: start / "tower" if source == name else resolve(source, *rest)  # noqa: E731
    monkeypatch.setattr(import_checkpoint, "resolve", local)
    source = import_start(start, tmp_path / "start", name)
    for folder, added in (("frozen", 0.0), ("tuned", 0.5)):
        trained, out = pretrained(source, tmp_path / folder, added), tmp_path / f"saisa-{folder}"
        convert("export", "--from", trained, "--layout", "saisa", "--to", out)
        tower = official(out)[2]
        assert tower == (str(out / "vision_tower") if added else name) and (out / "vision_tower").exists() == bool(
            added
        )
        kept = {path.name for path in (trained / "sidecar" / "model" / "files").iterdir()}
        assert {"tokenizer.model", "config.json", "LICENSE.txt"} <= kept and "notes.json" not in kept
    moved = tmp_path / "moved-saisa"
    (tmp_path / "saisa-tuned").rename(moved)
    convert("import", "--from", moved, "--to", tmp_path / "again")
    assert bits(moved / "vision_tower") != bits(start / "tower")


DECODER = {"model_type": "llava_llama", "hidden_size": 64, "num_attention_heads": 4, "mm_hidden_size": 1024}
TOWER = {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}


@pytest.mark.parametrize(
    ("name", "changes", "note"),
    [
        ("saisa-7b", {}, ""),
        ("My_SAISA", {"rope_scaling": {"type": "linear", "factor": 2.0}, "head_dim": 16}, ""),
        ("saisa-runs/checkpoint-5", {}, ""),
        ("official", {}, "must contain 'saisa': rename it to saisa-official"),
        ("saisa-mistral", {}, "'mistral' in its name"),
        ("saisa", {"mm_hidden_size": 768}, "1024 wide, and these are 768"),
        ("saisa", {"model_type": "llava_qwen"}, "only decoder is Llama's, and this is 'llava_qwen'"),
        ("saisa", {"model_type": "llava_mistral"}, "only decoder is Llama's"),
        ("saisa", {"head_dim": 32}, "64 / 4 wide, and these 32"),
        ("saisa", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "knows no rope_scaling like"),
        ("saisa", {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}}, "no rope_scaling like"),
        ("saisa", {"mm_vision_tower": "vision_tower"}, "no tower of the name 'vision_tower'"),
    ],
)
def test_what_the_official_program_does_not_run(name: str, changes: dict[str, Any], note: str, tmp_path: Path) -> None:
    directory = tmp_path / name
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({**DECODER, **TOWER, **changes}))
    (directory / "tokenizer.model").touch()
    notes = official_notes(directory)
    assert len(notes) == bool(note) and note in "".join(notes)
    (directory / "tokenizer.model").unlink()
    assert "no tokenizer.model" in official_notes(directory)[-1]


def test_a_tower_of_another_family(tmp_path: Path) -> None:
    directory, tower = tmp_path / "saisa", tmp_path / "saisa" / "vision_tower"
    tower.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({**DECODER, "mm_vision_tower": str(tower)}))
    (tower / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model"}))
    (directory / "tokenizer.model").touch()
    notes = "; ".join(official_notes(directory))
    assert "only tower is CLIP's, and this is 'siglip_vision_model'" in notes and "has no preprocessor_config" in notes


@pytest.mark.parametrize("kind", [byte_level, sentence_piece, train_tokenizer])
def test_a_tokenizer_of_ours_is_spelt_as_transformers_4_reads_it(kind: Callable[[], Any], tmp_path: Path) -> None:
    tokenizer = kind()
    tokenizer.save_pretrained(tmp_path)
    spell_for_transformers_4(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    assert all(isinstance(merge, str) for merge in raw["model"].get("merges", []))
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "what shape is present?\n\n the shape is  red: 1234 </s> \u00e9"
    assert again(text).input_ids == tokenizer(text).input_ids and again.decode(again(text).input_ids)
    (tmp_path / "config.json").write_text(json.dumps({**DECODER, **TOWER}))
    assert not any("slow tokenizers" in note for note in official_notes(tmp_path))
