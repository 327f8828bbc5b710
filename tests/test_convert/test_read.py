"""Import and export of directories: round trips bit for bit, configs, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from saisa_jax.config import ModelConfig, ProjectorConfig, RopeScalingConfig, VisionConfig
from saisa_jax.convert.configs import config_from_hf
from saisa_jax.convert.files.open import open_checkpoint
from saisa_jax.convert.files.tensors import INDEX
from saisa_jax.convert.layouts import LAYOUTS, layout_for
from saisa_jax.convert.match import layout_of
from saisa_jax.convert.read import import_model, import_params
from saisa_jax.convert.rows import ConvertError
from saisa_jax.convert.write import export_params, to_tensors

DATA = Path(__file__).parents[1] / "data"
BFLOAT16 = ml_dtypes.bfloat16

CONFIG = ModelConfig(
    vocab_size=130, embed_dim=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=10, max_length=64,
    vision=VisionConfig(image_size=28, patch_size=14, embed_dim=8, num_layers=3, num_heads=2, mlp_dim=12),
)  # fmt: skip
TEXT = {
    "model_type": "llama", "vocab_size": 130, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 10, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
VISION = {
    "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, "hidden_size": 8, "num_hidden_layers": 3,
    "num_attention_heads": 2, "intermediate_size": 12,
}  # fmt: skip


def model(layout: str) -> ModelConfig:
    alignment, sharing = ("saisa", "per_layer") if layout in ("saisa", "hf") else ("llava", "shared")
    return dataclasses.replace(CONFIG, alignment=alignment, projector=ProjectorConfig(sharing=sharing))


def tensors(layout: str, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """A random checkpoint in a layout."""
    rng = np.random.default_rng(0)
    rows = layout_for(model(layout), layout).rows
    return {key: rng.standard_normal(row.theirs).astype(dtype) for row in rows for key in row.keys}


def write(directory: Path, held: dict[str, np.ndarray], config: dict[str, Any] | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(held, directory / "model.safetensors")
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def assert_same(seen: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(seen) == set(expected)
    for key, value in expected.items():
        assert seen[key].dtype == value.dtype and seen[key].shape == value.shape, key
        assert seen[key].tobytes() == value.tobytes(), key


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, np.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_bit_for_bit(tmp_path: Path, layout: str, dtype: Any) -> None:
    held = tensors(layout, dtype)
    imported = import_params(write(tmp_path / "in", held), model(layout))  # also tells the layout
    assert imported.ignored == ()
    files = export_params(imported.params, model(layout), layout, tmp_path / "out")
    assert [file.name for file in files] == ["model.safetensors"]
    assert_same(load_file(files[0]), held)


@pytest.mark.parametrize("fixture", ["saisa_tiny", "llava_tiny"])
def test_recorded_checkpoints_come_back(fixture: str, tmp_path: Path) -> None:
    layout = layout_of(open_checkpoint(DATA / fixture))
    assert layout == {"saisa_tiny": "saisa", "llava_tiny": "llava-hf"}[fixture]
    raw = json.loads((DATA / fixture / "config.json").read_text())
    vision = tmp_path / "tower"
    vision.mkdir()
    (vision / "config.json").write_text(
        json.dumps(raw.get("vision_config")) if layout == "llava-hf" else
        (DATA / fixture / "vision_tower" / "config.json").read_text()
    )  # fmt: skip
    config = config_from_hf(DATA / fixture, vision=vision)
    imported = import_params(DATA / fixture, config)
    held = load_file(DATA / fixture / "model.safetensors")
    ignored = {key for key in held if key.startswith("model.mm_projector.")}
    assert set(imported.ignored) == ignored and len(ignored) == (4 if layout == "saisa" else 0)
    seen = dict(to_tensors(imported.params, config, layout, parts=("decoder", "projector")))
    assert_same(seen, {key: value for key, value in held.items() if key not in ignored})


def test_shards_and_dtype(tmp_path: Path) -> None:
    held = tensors("saisa")
    imported = import_params(write(tmp_path / "in", held), model("saisa"))
    files = export_params(imported.params, model("saisa"), "saisa", tmp_path / "out", shard_bytes=19000)
    assert len(files) > 2 and files[-1].name == INDEX
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 19000 for file in files[:-1])
    assert not list((tmp_path / "out").glob("*.partial"))
    again = import_params(tmp_path / "out", model("saisa"), dtype=BFLOAT16)
    for path, leaf in flatten_dict(again.params, sep="/").items():
        expected = flatten_dict(imported.params, sep="/")[path].astype(BFLOAT16)
        assert leaf.dtype == BFLOAT16 and leaf.tobytes() == expected.tobytes(), path
    with pytest.raises(ConvertError, match="empty directory"):
        export_params(imported.params, model("saisa"), "saisa", tmp_path / "out")


def test_spellings_of_transformers_5(tmp_path: Path) -> None:
    held = tensors("llava-hf")
    renamed = {}
    for key, value in held.items():
        new = key.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head", "lm_head")
        new = new.replace("vision_tower.vision_model.", "model.vision_tower.")
        renamed[new.replace("multi_modal_projector", "model.multi_modal_projector")] = value
    assert not set(held) & set(renamed)
    old = import_params(write(tmp_path / "4", held), model("llava-hf"))
    new = import_params(write(tmp_path / "5", renamed), model("llava-hf"))
    assert_same(flatten_dict(new.params, sep="/"), flatten_dict(old.params, sep="/"))


def test_whole_model_with_its_tower_elsewhere(tmp_path: Path) -> None:
    held = tensors("saisa")
    tower = {key: value for key, value in held.items() if "vision_tower" in key}
    held = {key: value for key, value in held.items() if key not in tower}
    held["model.mm_projector.0.weight"] = np.ones((24, 8), np.float32)
    prefix = "model.vision_tower.vision_tower."
    raw = {**TEXT, "model_type": "llava_llama", "mm_vision_tower": "tower", "mm_vision_select_layer": -2}
    raw["image_aspect_ratio"] = "pad"
    directory = write(tmp_path / "in", held, raw)
    write(directory / "tower", {key.removeprefix(prefix): value for key, value in tower.items()}, VISION)
    imported = import_model(directory)
    assert imported.config == model("saisa")
    assert imported.ignored == ("model.mm_projector.0.weight",)
    assert set(imported.params) == {"embed_tokens", "layers", "final_norm", "lm_head", "vision"}
    assert_same(dict(to_tensors(imported.params, imported.config, "saisa")), tensors("saisa"))

    # The official loader reads the tower that the config names, whatever else the checkpoint carries.
    carried = write(tmp_path / "carried", tensors("saisa"), raw | {"mm_vision_tower": "../in/tower"})
    with pytest.raises(ConvertError, match="vision="):
        import_model(carried)
    other = import_model(carried, vision=directory / "tower")
    assert_same(flatten_dict(other.params, sep="/"), flatten_dict(imported.params, sep="/"))


def test_tied_head(tmp_path: Path) -> None:
    config = dataclasses.replace(model("hf-llm"), tie_embeddings=True)
    held = tensors("hf-llm")
    head = held.pop("lm_head.weight")
    assert "lm_head" not in import_params(write(tmp_path / "without", held), config).params
    same = held | {"lm_head.weight": held["model.embed_tokens.weight"]}
    assert import_params(write(tmp_path / "same", same), config).ignored == ("lm_head.weight",)
    with pytest.raises(ConvertError, match=r"not tied +lm_head\.weight.*tie_embeddings=False"):
        import_params(write(tmp_path / "other", held | {"lm_head.weight": head}), config)


# --- What is refused --------------------------------------------------------------------------------------------------


def test_missing_unexpected_and_misshaped_are_all_listed(tmp_path: Path) -> None:
    held = tensors("hf-llm")
    held["model.layers.1.mlp.up_porj.weight"] = held.pop("model.layers.1.mlp.up_proj.weight")
    held["model.norm.weight"] = np.ones(25, np.float32)
    held["model.layers.3.mlp.up_proj.weight"] = np.ones((10, 24), np.float32)
    held["model.layers.0.self_attn.q_proj.weight"] = np.ones((24, 24), np.int64)
    del held["lm_head.weight"]
    with pytest.raises(ConvertError) as error:
        import_params(write(tmp_path, held), model("hf-llm"))
    lines = str(error.value).splitlines()
    assert "(6 tensors)" in lines[0]
    assert [" ".join(line.split()) for line in lines[1:]] == [
        "missing model.layers.1.mlp.up_proj.weight (nearest: model.layers.3.mlp.up_proj.weight, "
        "model.layers.1.mlp.up_porj.weight)",
        "missing lm_head.weight (if it is the table of tokens, config.json has to say tie_word_embeddings: true)",
        "unexpected model.layers.1.mlp.up_porj.weight [10, 24]",
        "unexpected model.layers.3.mlp.up_proj.weight [10, 24]",
        "wrong dtype model.layers.0.self_attn.q_proj.weight is I64, expected a float",
        "misshaped model.norm.weight is [25], expected [24] for final_norm/scale",
    ]


def test_the_wrong_fixture() -> None:
    with pytest.raises(ConvertError) as error:
        import_params(DATA / "saisa_tiny", model("llava-hf"), layout="llava-hf")
    assert "missing     multi_modal_projector.linear_1.weight" in str(error.value)
    assert "unexpected  model.layers.2.mm_projector.2.bias [64]" in str(error.value)


def test_one_tensor_under_two_spellings(tmp_path: Path) -> None:
    held = tensors("hf-llm")
    held["norm.weight"] = held["model.norm.weight"]
    with pytest.raises(ConvertError, match=r"twice +model\.norm\.weight"):
        import_params(write(tmp_path, held), model("hf-llm"))


def test_dtypes_that_differ_within_one_parameter(tmp_path: Path) -> None:
    held = tensors("hf-llm")
    held["model.layers.1.mlp.up_proj.weight"] = held["model.layers.1.mlp.up_proj.weight"].astype(BFLOAT16)
    directory = write(tmp_path, held)
    with pytest.raises(
        ConvertError, match=r"mixed +layers/mlp/up_proj/kernel: .*\.0\..* is F32, .*\.1\..* BF16; .*--dtype="
    ):
        import_params(directory, model("hf-llm"))
    import_params(directory, model("hf-llm"), dtype=np.float32)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    params = import_params(write(tmp_path / "in", tensors("saisa")), model("saisa")).params
    export_params(params, model("saisa"), "saisa", tmp_path / "out", shard_bytes=8000)
    return tmp_path / "out"


@pytest.mark.parametrize("name", ["../in/model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "model.bin"])
def test_index_that_leaves_the_directory(sharded: Path, name: str) -> None:
    edit_index(sharded, name)
    with pytest.raises(ConvertError, match="not safetensors of its own directory"):
        import_params(sharded, model("saisa"))


def edit_index(directory: Path, file: str) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = file
    (directory / INDEX).write_text(json.dumps(index))


def test_index_that_contradicts_its_shards(sharded: Path) -> None:
    edit_index(sharded, "model-00099-of-00099.safetensors")
    with pytest.raises(ConvertError, match="not there: model-00099"):
        import_params(sharded, model("saisa"))
    first = sorted(sharded.glob("model-*.safetensors"))[0]
    edit_index(sharded, first.name)
    with pytest.raises(ConvertError, match=rf"lm_head.weight \(said to be in {first.name}\)"):
        import_params(sharded, model("saisa"))
    (sharded / INDEX).write_text("{}")
    with pytest.raises(ConvertError, match="not an index"):
        import_params(sharded, model("saisa"))
    (sharded / INDEX).unlink()
    with pytest.raises(ConvertError, match="which belong together"):
        import_params(sharded, model("saisa"))


def test_truncated_and_missing_files(tmp_path: Path) -> None:
    directory = write(tmp_path / "in", tensors("hf-llm"))
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ConvertError, match="truncated"):
        import_params(directory, model("hf-llm"))
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ConvertError, match=r"pytorch_model\.bin is no whole file that torch"):
        import_params(directory, model("hf-llm"))
    with pytest.raises(ConvertError, match="not a directory"):
        import_params(tmp_path / "nowhere", model("hf-llm"))


def test_unknown_layout_of_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="no known layout has tensors like bert"):
        layout_of(open_checkpoint(write(tmp_path, {"bert.x": np.ones(1, np.float32)})))


def test_export_of_a_tree_that_does_not_fit(tmp_path: Path) -> None:
    params = import_params(write(tmp_path / "in", tensors("hf-llm")), model("hf-llm")).params
    del params["final_norm"]
    params["lm_head"]["kernel"] = params["lm_head"]["kernel"][:, :130]
    with pytest.raises(ConvertError, match=r"(?s)missing +final_norm/scale.*misshaped +lm_head/kernel is \[24, 130\]"):
        export_params(params, model("hf-llm"), "hf-llm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- Configs ----------------------------------------------------------------------------------------------------------


def config_of(directory: Path, raw: dict[str, Any], layout: str, **options: Any) -> ModelConfig:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    return config_from_hf(directory, layout=layout, **options)


def test_decoder_configs(tmp_path: Path) -> None:
    llama = config_of(tmp_path, TEXT, "hf-llm")
    assert dataclasses.replace(llama, vision=CONFIG.vision) == CONFIG
    old = config_of(tmp_path, TEXT | {"rope_theta": 5e5, "rope_scaling": None, "head_dim": None}, "hf-llm")
    new = config_of(tmp_path, TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "hf-llm")
    assert old == new and new.rope_theta == 5e5
    mistral = TEXT | {"model_type": "mistral"}
    assert config_of(tmp_path, mistral, "hf-llm").sliding_window == 4096
    assert config_of(tmp_path, mistral | {"sliding_window": None}, "hf-llm").sliding_window is None
    qwen2 = config_of(
        tmp_path, TEXT | {"model_type": "qwen2", "sliding_window": 9, "tie_word_embeddings": True}, "hf-llm"
    )
    assert qwen2.qkv_bias and qwen2.tie_embeddings and qwen2.sliding_window is None
    assert config_of(tmp_path, {"model_type": "llama"}, "hf-llm").norm_eps == 1e-6  # the class default


def test_rope_scaling_in_both_spellings(tmp_path: Path) -> None:
    llama3 = {
        "rope_type": "llama3", "factor": 32, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 4096,
    }  # fmt: skip
    old = config_of(tmp_path, TEXT | {"rope_theta": 5e5, "rope_scaling": llama3}, "hf-llm")
    new = config_of(tmp_path, TEXT | {"rope_parameters": llama3 | {"rope_theta": 5e5}}, "hf-llm")
    assert old == new and new.rope_theta == 5e5
    assert new.rope_scaling == RopeScalingConfig("llama3", factor=32.0, original_max_length=4096)
    linear = config_of(tmp_path, TEXT | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "hf-llm")
    assert linear.rope_scaling == RopeScalingConfig("linear", factor=2.0)


def test_vision_configs(tmp_path: Path) -> None:
    assert config_of(tmp_path, VISION, "hf-vision").vision == CONFIG.vision
    siglip = config_of(tmp_path, {"vision_config": VISION | {"model_type": "siglip_vision_model"}}, "hf-vision").vision
    assert (siglip.class_token, siglip.pre_norm, siglip.patch_bias) == (False, False, True)
    assert siglip.activation == "gelu_tanh" and siglip.image_mean == (0.5, 0.5, 0.5)
    raw = {"model_type": "dinov2", "hidden_size": 8, "num_attention_heads": 2, "image_size": 28}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
    dinov2 = config_of(tmp_path, raw, "hf-vision", select_layer=9).vision
    assert dinov2.layer_scale and dinov2.mlp_dim == 32 and dinov2.num_used_layers == 9
    assert dinov2.image_mean == (0.1, 0.2, 0.3)


def test_convnext_config(tmp_path: Path) -> None:
    raw = {"model_type": "convnext", "depths": [2, 1, 1], "hidden_sizes": [8, 12, 20], "image_size": 224}
    last = config_of(tmp_path, raw, "hf-vision").vision
    assert (last.kind, last.depths, last.widths, last.num_layers) == ("convnext", (2, 1, 1), (8, 12, 20), 3)
    assert (last.select_layer, last.embed_dim, last.patch_size, last.num_patches) == (-1, 20, 16, 14**2)
    assert last.layer_scale and last.norm_eps == 1e-6 and last.image_mean == (0.485, 0.456, 0.406)
    earlier = config_of(tmp_path, raw | {"layer_scale_init_value": 0}, "hf-vision", select_layer=-2).vision
    assert (earlier.embed_dim, earlier.patch_size, earlier.layer_scale) == (12, 8, False)
    for size in (384, {"shortest_edge": 384}, {"height": 384, "width": 384}):  # what the weights were trained on
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": size, "image_std": [0.5, 0.5, 0.5]}))
        published = config_of(tmp_path, raw, "hf-vision").vision
        assert (published.image_size, published.image_std) == (384, (0.5, 0.5, 0.5))
    with pytest.raises(ConvertError, match=r"hidden_sizes=\(8, 12\) are not of one length"):
        config_of(tmp_path, raw | {"hidden_sizes": [8, 12]}, "hf-vision")


def test_llava_hf_config(tmp_path: Path) -> None:
    raw = {"text_config": TEXT, "vision_config": VISION, "vision_feature_layer": -2}
    assert config_of(tmp_path, raw, "llava-hf") == model("llava-hf")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "gpt2"}, "known: llama, mistral"),
        (TEXT | {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "type 'yarn' .* default, linear, llama3"),
        (TEXT | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lack low_freq_factor, high_freq"),
        (TEXT | {"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5 must be at least 1"),
        (TEXT | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        (TEXT | {"attention_bias": True}, "attention_bias=True is not supported"),
        (TEXT | {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        (TEXT | {"num_key_value_heads": 3}, "not divisible"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConvertError, match=message):
        config_of(tmp_path, raw, "hf-llm")


def test_config_files_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="is not there"):
        config_from_hf(tmp_path, layout="hf-llm")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConvertError, match="is not JSON"):
        config_from_hf(tmp_path, layout="hf-llm")
    raw = TEXT | {"model_type": "llava_llama", "mm_projector_type": "linear"}
    with pytest.raises(ConvertError, match="mm_projector_type='linear' is not supported"):
        config_of(tmp_path, raw, "llava")


def test_a_decoder_is_no_whole_model(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="not a whole multimodal model"):
        import_model(write(tmp_path / "llm", tensors("hf-llm"), TEXT))
    raw = {"text_config": TEXT, "vision_config": VISION, "vision_feature_layer": -2}
    with pytest.raises(ConvertError, match="leave out --vision"):
        import_model(write(tmp_path / "llava", tensors("llava-hf"), raw), vision=tmp_path)


def test_nothing_of_a_fixture_is_written(tmp_path: Path) -> None:
    """A directory that may not be written is enough to import from."""
    copy = shutil.copytree(DATA / "saisa_tiny", tmp_path / "copy")
    for path in [*copy.rglob("*"), copy]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    config = config_from_hf(copy)
    import_params(copy, config)
    for path in [copy, *copy.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
