"""LoRA adapters over their base, projectors alone, and what a newcomer is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from saisa_jax.__main__ import main
from saisa_jax.checkpoints import load_model
from saisa_jax.config import ConfigError
from saisa_jax.configs import imported
from saisa_jax.convert.files.open import open_checkpoint
from saisa_jax.convert.rows import ConvertError
from saisa_jax.testing.checkpoints import write_checkpoint

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
RANDOM = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape, np.float32)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for layout in ("hf-llm", "llava", "hf-vision"):
        write_checkpoint(root / layout, layout, dtype="F32")
    return root


def write_adapter(directory: Path, base: Path, said: dict[str, Any], more: dict[str, np.ndarray]) -> dict[str, Any]:
    held = load_file(base / "model.safetensors")
    tensors = dict(more)
    for name, rank in ((Q, 4), (UP, 2)):
        outputs, inputs = held[f"{name}.weight"].shape
        tensors[f"base_model.model.{name}.lora_A.weight"] = array(rank, inputs)
        tensors[f"base_model.model.{name}.lora_B.weight"] = array(outputs, rank)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(base), **said}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize(
    ("said", "scales"),
    [
        ({}, (8 / 4, 8 / 2)),
        ({"use_rslora": True}, (8 / 2, 8 / 2**0.5)),
        ({"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 3}, "use_dora": False}, (8 / 4, 3 / 2)),
    ],
)
def test_an_adapter_is_merged_into_its_base(
    said: dict[str, Any], scales: tuple[float, float], sources: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = array(*load_file(sources / "hf-llm" / "model.safetensors")["lm_head.weight"].shape)
    prefix, (rows, columns) = "base_model.model.model.embed_tokens.lora_embedding", head.shape
    table = {f"{prefix}_A": array(4, rows), f"{prefix}_B": array(columns, 4)}
    more = {"base_model.model.lm_head.weight": head, **table}
    tensors = write_adapter(tmp_path / "lora", sources / "hf-llm", said, more)
    base, merged = open_checkpoint(sources / "hf-llm"), open_checkpoint(tmp_path / "lora")
    assert "is an adapter: it is merged into" in caplog.text and merged.names == base.names
    for name, scale in zip((Q, UP), scales, strict=True):
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        wanted = base.read(f"{name}.weight") + scale * (b @ a)
        np.testing.assert_allclose(merged.read(f"{name}.weight"), wanted, atol=1e-5)
    name = "model.embed_tokens.weight"
    wanted = base.read(name) + scales[0] * (table[f"{prefix}_B"].astype(np.float64) @ table[f"{prefix}_A"]).T
    np.testing.assert_allclose(merged.read(name), wanted, atol=1e-5)
    np.testing.assert_array_equal(merged.read("lm_head.weight"), head)
    np.testing.assert_array_equal(merged.read("model.norm.weight"), base.read("model.norm.weight"))


def test_an_adapter_is_imported_over_another_base_by_name(sources: Path, tmp_path: Path) -> None:
    tensors = write_adapter(
        tmp_path / "lora", sources / "hf-llm", {"base_model_name_or_path": "/gone/quantised-4bit"}, {}
    )
    words = ["convert", "import", f"--from={tmp_path / 'lora'}", f"--to={tmp_path / 'out'}"]
    assert main(words) == 2
    assert main([*words, f"--base={sources / 'hf-llm'}"]) == 0
    kernel = np.asarray(load_model(tmp_path / "out")[0]["layers"]["attn"]["q_proj"]["kernel"])[0]
    a, b = (tensors[f"base_model.model.{Q}.lora_{side}.weight"] for side in "AB")
    wanted = load_file(sources / "hf-llm" / "model.safetensors")[f"{Q}.weight"] + 2 * (b @ a)
    np.testing.assert_allclose(kernel.reshape(wanted.T.shape), wanted.T, atol=1e-5)


def test_a_folder_of_llava_lora(sources: Path, tmp_path: Path) -> None:
    """An LLM as the base; config.json and the projector are the adapter's."""
    torch = pytest.importorskip("torch", reason="CPU torch is not installed")
    whole = load_file(sources / "llava" / "model.safetensors")
    llm = tmp_path / "llm"
    llm.mkdir()
    save_file({k: v for k, v in whole.items() if "projector" not in k and "vision" not in k}, llm / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (llm / name).write_bytes((sources / "llava" / name).read_bytes())
    write_adapter(tmp_path / "lora", llm, {}, {})
    projector = {k: torch.tensor(v) + 1 for k, v in whole.items() if ".mm_projector." in k}
    torch.save(
        {f"base_model.model.{k}": v for k, v in projector.items()}, tmp_path / "lora" / "non_lora_trainables.bin"
    )
    (tmp_path / "lora" / "config.json").write_bytes((sources / "llava" / "config.json").read_bytes())
    words = [f"--from={tmp_path / 'lora'}", f"--vision={sources / 'hf-vision'}", f"--to={tmp_path / 'out'}"]
    assert main(["convert", "import", *words]) == 0
    params, config, tokenizer, _ = load_model(tmp_path / "out")
    assert config.model.alignment == "llava" and tokenizer is not None
    wanted = projector["model.mm_projector.0.weight"].numpy().T
    np.testing.assert_array_equal(np.asarray(params["visual_proj"]["fc1"]["kernel"]), wanted)


@pytest.mark.parametrize(
    ("said", "more", "message"),
    [
        ({"peft_type": "IA3"}, {}, "peft_type='IA3' of an adapter is not supported"),
        ({"use_dora": True}, {}, r"use_dora=True is not supported: merge it with PEFT"),
        ({}, {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": array(2, 4)}, "has no place for"),
        ({}, {"base_model.model.model.norm.lora_magnitude_vector": array(2)}, "lora_magnitude_vector"),
    ],
)
def test_adapters_that_are_not_computed(
    said: dict[str, Any], more: dict[str, np.ndarray], message: str, sources: Path, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "lora", sources / "hf-llm", said, more)
    with pytest.raises(ConvertError, match=message):
        open_checkpoint(tmp_path / "lora")


def test_adapted_embeddings_under_a_tied_head_are_refused(sources: Path, tmp_path: Path) -> None:
    held = load_file(sources / "hf-llm" / "model.safetensors")
    (tmp_path / "tied").mkdir()
    (tmp_path / "tied" / "config.json").write_bytes((sources / "hf-llm" / "config.json").read_bytes())
    rows, columns = held.pop("lm_head.weight").shape
    save_file(held, tmp_path / "tied" / "model.safetensors")
    prefix = "base_model.model.model.embed_tokens.lora_embedding"
    more = {f"{prefix}_A": array(4, rows), f"{prefix}_B": array(columns, 4)}
    write_adapter(tmp_path / "lora", tmp_path / "tied", {}, more)
    with pytest.raises(ConvertError, match=r"lora_embedding_A and _B.*is tied to them"):
        open_checkpoint(tmp_path / "lora")


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_a_projector_alone_starts_stage_2(
    form: str, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = load_file(sources / "llava" / "model.safetensors")
    held = {k: v for k, v in whole.items() if ".mm_projector." in k}
    where = tmp_path / "stage1"
    where.mkdir()
    if form == "bin":
        torch = pytest.importorskip("torch", reason="CPU torch is not installed")
        torch.save({k: torch.tensor(v) for k, v in held.items()}, where / "mm_projector.bin")
    else:
        save_file({k.removeprefix("model."): v for k, v in held.items()}, where / "mm_projector.safetensors")
    assert main(["convert", "import", f"--from={where}", f"--to={tmp_path / 'out'}"]) == 2
    assert f"--vision=DIR --projector={where}" in capsys.readouterr().err
    parts = [f"--llm={sources / 'hf-llm'}", f"--vision={sources / 'hf-vision'}", f"--projector={where}"]
    assert main(["convert", "import", *parts, f"--to={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    assert "1 of 2 layers are used (model.vision.select_layer=-2); the last 1 are not, and stay in the sidecar" in out
    params, config, _, metadata = load_model(tmp_path / "out")
    np.testing.assert_array_equal(
        np.asarray(params["visual_proj"]["fc2"]["kernel"]), held["model.mm_projector.2.weight"].T
    )
    # Stage 2 may start from it, with a copy in every layer.
    assert "projector" in metadata["imported"]["parts"] and metadata["stage"] == "pretrain"
    assert config.finetune.sharing == "per_layer"
    (where / "config.json").write_text(json.dumps({"mm_projector_type": "linear"}))
    assert main(["convert", "import", *parts, f"--to={tmp_path / 'other'}"]) == 2
    assert "mm_projector_type='linear' is not supported" in capsys.readouterr().err


def test_what_a_newcomer_is_told(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "apart", "llava", parts=("decoder", "projector"))
    file = tmp_path / "apart" / "config.json"
    name = "openai/clip-vit-large-patch14-336"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"mm_vision_tower": name}))
    assert main(["convert", "inspect", str(tmp_path / "apart")]) == 0
    assert f"The vision tower ({name}) is not here: an import needs --vision={name}" in capsys.readouterr().out
    assert main(["convert", "import", f"--from={tmp_path / 'apart'}", f"--to={tmp_path / 'out'}"]) == 2
    assert f"name it, --vision={name}" in capsys.readouterr().err
    assert main(["convert", "import", f"--llm={sources / 'hf-llm'}", f"--to={tmp_path / 'llm'}"]) == 0
    with pytest.raises(ConfigError, match=r"an LLM without a vision encoder.*--llm=LLM --vision=ENCODER"):
        imported.get_config(str(tmp_path / "llm"))
