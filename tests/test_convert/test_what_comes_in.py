"""Sources as people have them: quantised, with options that are not computed, tied in any way."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from saisa_jax.__main__ import main
from saisa_jax.checkpoints import load_model
from saisa_jax.convert.configs import config_from_hf, decoder_config_from_hf, vision_config_from_hf
from saisa_jax.convert.files.open import open_checkpoint
from saisa_jax.convert.match import settle_head
from saisa_jax.convert.read import find_pieces
from saisa_jax.convert.rows import ConvertError
from saisa_jax.testing.checkpoints import write_checkpoint

LINEAR = "model.layers.0.mlp.up_proj"
U8, I32, I8 = np.zeros((4, 1), np.uint8), np.zeros((4, 1), np.int32), np.zeros((4, 4), np.int8)
F8, F32 = np.zeros((4, 4), ml_dtypes.float8_e4m3fn), np.zeros(4, np.float32)


def write(directory: Path, tensors: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return directory


# --- quantised --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "config", "told"),
    [
        (
            {"weight": U8, "weight.absmax": F32, "weight.quant_map": F32, "weight.quant_state.bitsandbytes__nf4": U8},
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "bitsandbytes, 4 bits",
        ),
        ({"weight": I8, "SCB": F32}, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"qweight": I32, "qzeros": I32, "g_idx": I32}, {"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
        ({"qweight": I32, "qzeros": I32, "scales": F32}, {"quant_method": "awq", "bits": 4}, "awq, 4 bits"),
        ({"weight": F8, "weight_scale_inv": F32}, {"quant_method": "fp8"}, "fp8"),
        ({"weight_packed": I32, "weight_scale": F32}, {"quant_method": "compressed-tensors"}, "compressed-tensors"),
        # Without a word in config.json.
        ({"weight": U8, "weight.absmax": F32}, None, "bitsandbytes"),
        ({"qweight": I32, "g_idx": I32}, None, "GPTQ"),
        ({"weight_packed": I32}, None, "compressed-tensors"),
        ({"weight": F8}, None, "F8_E4M3"),
        ({"weight": I8}, None, "I8"),
    ],
)  # fmt: skip
def test_quantised_checkpoints_are_refused_in_one_line(
    tensors: dict[str, Any],
    config: dict[str, Any] | None,
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    held = {f"{LINEAR}.{name}": value for name, value in tensors.items()}
    where = write(
        tmp_path / "in",
        {"model.embed_tokens.weight": F32, **held},
        {"model_type": "llama", **({"quantization_config": config} if config else {})},
    )
    for words in (["import", f"--from={where}", f"--to={tmp_path / 'out'}"], ["inspect", str(where)]):
        assert main(["convert", *words]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"is quantised ({told}; it holds {LINEAR}." in line and "in bfloat16, float16 or float32" in line


def test_whole_weights_are_read_whatever_config_json_remembers(tmp_path: Path) -> None:
    """What was trained over a quantised base and merged keeps its quantization_config."""
    where = tmp_path / "in"
    raw = write_checkpoint(where, "hf-llm")
    (where / "config.json").write_text(json.dumps({**raw, "quantization_config": {"quant_method": "bitsandbytes"}}))
    assert open_checkpoint(where).names


# --- options of LLaVA and its successors ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["saisa", "llava", "llava-hf"])
@pytest.mark.parametrize(
    ("field", "value", "instead"),
    [
        ("mm_use_im_start_end", True, "<im_start>"),
        ("mm_use_im_patch_token", True, "<im_patch>"),
        ("s2", True, "several sizes"),
        ("image_aspect_ratio", "anyres_max_9", "anyres and mm_patch_merge_type='flat'"),
        ("mm_patch_merge_type", "spatial_unpad", "image_newline"),
        ("image_grid_pinpoints", [[336, 672]], "image_newline"),
        ("partial_rotary_factor", 0.5, None),
    ],
)
def test_options_that_are_not_computed(
    layout: str, field: str, value: Any, instead: str | None, tmp_path: Path
) -> None:
    raw = write_checkpoint(tmp_path / "in", layout)
    write_checkpoint(tmp_path / "tower", "hf-vision")
    vision = None if layout == "llava-hf" else tmp_path / "tower"

    def read(**changes: Any) -> Any:
        text = {"text_config": raw["text_config"] | changes} if layout == "llava-hf" else {}
        return config_from_hf(tmp_path / "in", layout=layout, vision=vision, raw=raw | text | changes)

    with pytest.raises(ConvertError) as caught:
        read(**{field: value})
    said = str(caught.value)
    assert f"{field}={value!r} is not supported" in said and "\n" not in said
    if instead:
        assert instead in said and "take a checkpoint" in said
    off: dict[str, Any] = {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat", "partial_rotary_factor": 1.0}
    for value in (off.get(field), None):
        assert read(**{field: value}).alignment  # is read


def test_successors_of_llava_by_name(tmp_path: Path) -> None:
    raw = write_checkpoint(tmp_path / "in", "llava-hf")
    with pytest.raises(
        ConvertError,
        match=r"model_type='llava_next' is not supported: .*image_newline.*take a checkpoint of LLaVA-1\.5",
    ):
        config_from_hf(tmp_path / "in", layout="llava-hf", raw=raw | {"model_type": "llava_next"})


# --- inf and NaN ------------------------------------------------------------------------------------------------------


def test_inf_and_nan_only_when_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path / "in", "hf-llm", dtype="F32")
    held = load_file(tmp_path / "in" / "model.safetensors")
    bad = np.array(held["model.norm.weight"])
    bad[:2] = np.inf, np.nan
    save_file({**held, "model.norm.weight": bad}, tmp_path / "in" / "model.safetensors")
    words = ["convert", "import", f"--from={tmp_path / 'in'}", f"--to={tmp_path / 'out'}"]
    assert main(words) == 2
    assert "--allow_nonfinite imports them as they are" in capsys.readouterr().err
    with caplog.at_level(logging.WARNING):
        assert main([*words, "--allow_nonfinite"]) == 0
    assert "holds inf or NaN, and they are kept, in 1 tensors:\n  model.norm.weight" in caplog.text
    np.testing.assert_array_equal(np.asarray(load_model(tmp_path / "out")[0]["final_norm"]["scale"]), bad)


# --- tied heads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("said", "held"),
    [
        (True, "table"), (True, "both equal"), (True, "both unequal"), (True, "head"),
        (False, "both equal"), (False, "both unequal"), (None, "both unequal"),
    ],
)  # fmt: skip
def test_heads_are_tied_as_transformers_ties_them(model_type: str, said: Any, held: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="CPU torch is not installed")
    sizes: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    made = transformers.AutoModelForCausalLM.from_config(config)
    tensors = {name: value.numpy() for name, value in made.state_dict().items()}
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    if held != "both unequal":
        tensors[head] = np.array(tensors[table])
    for name in {"table": [head], "head": [table]}.get(held, []):
        del tensors[name]
    raw = {"model_type": model_type, **sizes, "architectures": [type(made).__name__]}
    write(tmp_path, tensors, raw if said is None else {**raw, "tie_word_embeddings": said})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)

    source = open_checkpoint(tmp_path)
    ours = settle_head(source, config_from_hf(tmp_path, layout="hf-llm"), "hf-llm")
    (piece,) = find_pieces(source, ours, "hf-llm")
    params = dict(piece.read())
    our_table = params["embed_tokens/embedding"][:40]
    our_head = params["lm_head/kernel"][:, :40].T if "lm_head/kernel" in params else our_table
    np.testing.assert_array_equal(our_table, theirs.get_input_embeddings().weight.detach().numpy())
    np.testing.assert_array_equal(our_head, theirs.get_output_embeddings().weight.detach().numpy())


def test_a_head_that_is_missing_says_how_it_would_be_tied(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", "hf-llm")
    held = load_file(tmp_path / "in" / "model.safetensors")
    save_file({k: v for k, v in held.items() if k != "lm_head.weight"}, tmp_path / "in" / "model.safetensors")
    source = open_checkpoint(tmp_path / "in")
    with pytest.raises(ConvertError, match=r"(?s)missing +lm_head\.weight.*tie_word_embeddings: true"):
        find_pieces(source, config_from_hf(tmp_path / "in", layout="hf-llm"), "hf-llm")


@pytest.mark.parametrize(("top", "text"), [(True, False), (False, True), (None, None), (True, None), (None, True)])
def test_a_multimodal_model_is_tied_if_either_says_so(top: bool | None, text: bool | None, tmp_path: Path) -> None:
    raw = write_checkpoint(tmp_path / "in", "llava-hf")
    raw |= {"tie_word_embeddings": top, "text_config": raw["text_config"] | {"tie_word_embeddings": text}}
    ours = config_from_hf(tmp_path / "in", layout="llava-hf", raw=raw)
    assert ours.tie_embeddings == bool(top or text)


# --- config.json with holes -------------------------------------------------------------------------------------------

CLASSES = {
    "llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig, "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config, "smollm3": transformers.SmolLM3Config,
    "clip_vision_model": transformers.CLIPVisionConfig, "siglip_vision_model": transformers.SiglipVisionConfig,
    "dinov2": transformers.Dinov2Config, "dinov2_with_registers": transformers.Dinov2WithRegistersConfig,
    "convnext": transformers.ConvNextConfig,
}  # fmt: skip


@pytest.mark.parametrize("model_type", CLASSES)
def test_missing_and_null_fields_are_the_defaults_of_transformers(model_type: str) -> None:
    read = decoder_config_from_hf if "num_key_value_heads" in CLASSES[model_type]().to_dict() else vision_config_from_hf
    whole = {"model_type": model_type, **CLASSES[model_type]().to_dict()}
    wanted = read(whole, Path("x"))
    assert read({"model_type": model_type}, Path("x")) == wanted
    null_says = ("sliding_window", "num_key_value_heads", "head_dim", "model_type")  # that there is none, or all heads
    for field in set(whole) - set(null_says):
        assert read(whole | {field: None}, Path("x")) == wanted, field
        assert read({k: v for k, v in whole.items() if k != field}, Path("x")) == wanted, field


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_null_heads_are_as_many_as_queries(model_type: str) -> None:
    fields = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": None, "head_dim": None}
    ours = decoder_config_from_hf({"model_type": model_type, **fields}, Path("x"))
    assert ours.num_kv_heads == 4 and ours.head_dim == 16


def test_a_multimodal_config_with_holes(tmp_path: Path) -> None:
    wanted = config_from_hf(tmp_path, layout="llava-hf", raw=transformers.LlavaConfig().to_dict())
    assert (wanted.vision.image_size, wanted.vision.embed_dim, wanted.vision.select_layer) == (336, 1024, -2)
    for raw in ({"model_type": "llava"}, dict.fromkeys(transformers.LlavaConfig().to_dict()) | {"model_type": "llava"}):
        assert config_from_hf(tmp_path, layout="llava-hf", raw=raw) == wanted
