"""The layouts cover every family, and their rows can be undone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from saisa_jax.config import ModelConfig, ProjectorConfig, VisionConfig
from saisa_jax.convert.layouts import LAYOUTS, layout_for
from saisa_jax.convert.rows import ConvertError, TensorRow
from saisa_jax.models.saisa import abstract_params
from saisa_jax.presets import LLMS, VISIONS, make

CLIP = VisionConfig(image_size=28, patch_size=14, embed_dim=8, num_layers=3, num_heads=2, mlp_dim=12)
SIGLIP = dataclasses.replace(
    CLIP, family="siglip", class_token=False, pre_norm=False, patch_bias=True, activation="gelu_tanh"
)
DINOV2 = dataclasses.replace(
    CLIP, family="dinov2", pre_norm=False, patch_bias=True, layer_scale=True, post_norm=True, select_layer=-1
)
CONVNEXT = VisionConfig(
    kind="convnext",
    family="convnext",
    image_size=32,
    patch_size=8,
    embed_dim=12,
    num_layers=3,
    depths=(2, 1, 2),
    widths=(8, 12, 20),
    layer_scale=True,
    class_token=False,
    pre_norm=False,
    select_layer=-2,
)
REGISTERS = dataclasses.replace(DINOV2, family="dinov2_with_registers", num_registers=3)
TOWERS = {"clip": CLIP, "siglip": SIGLIP, "dinov2": DINOV2, "dinov2_with_registers": REGISTERS, "convnext": CONVNEXT}
SMALL = ModelConfig(
    vocab_size=130, embed_dim=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=10, vision=CLIP
)


def model(layout: str, **changes: object) -> ModelConfig:
    sharing = "per_layer" if layout == "saisa" else "shared"
    return dataclasses.replace(SMALL, projector=ProjectorConfig(sharing=sharing), **changes)


def covered(config: ModelConfig, *layouts: str) -> dict[str, tuple[int, ...]]:
    return {row.path: row.shape for layout in layouts for row in layout_for(config, layout).rows}


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten_dict(abstract_params(config), sep="/").items()}


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("layout", ["saisa", "llava", "llava-hf"])
def test_rows_are_exactly_the_parameters(layout: str, tower: str) -> None:
    config = model(layout, vision=TOWERS[tower])
    assert covered(config, layout) == shapes(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_bias": True},
        {"qk_norm": True},
        {"unrotated_layers": (1,)},
        {"tie_embeddings": True},
        {"visual_layers": (0, 2)},
        {"projector": ProjectorConfig(sharing="per_layer", hidden_dim=7)},
    ],
)
def test_rows_follow_the_options(changes: dict[str, object]) -> None:
    config = dataclasses.replace(model("saisa"), **changes)
    assert covered(config, "saisa") == shapes(config)


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("llm", LLMS)
def test_rows_cover_every_preset(llm: str, vision: str) -> None:
    config = make(llm, vision)
    assert covered(config, "saisa") == covered(config, "saisa", "hf-vision", "hf-llm") == shapes(config)


@pytest.mark.parametrize(
    ("layout", "tower"), [*((layout, "clip") for layout in LAYOUTS), *(("hf-vision", tower) for tower in TOWERS)]
)
def test_rows_can_be_undone_bit_for_bit(layout: str, tower: str) -> None:
    rng = np.random.default_rng(0)
    for row in layout_for(model(layout, vision=TOWERS[tower]), layout).rows:
        theirs = rng.standard_normal(row.theirs, dtype=np.float32)
        ours = row.to_ours(theirs)
        assert ours.shape == row.ours
        np.testing.assert_array_equal(row.to_theirs(ours), theirs)


def test_vocabulary_is_padded_with_zeros_and_cropped() -> None:
    rows = {row.path: row for row in layout_for(SMALL, "hf-llm").rows}
    head = rows["lm_head/kernel"].to_ours(np.ones((130, 24), np.float32))
    assert head.shape == (24, 256)
    assert head[:, :130].all() and not head[:, 130:].any()
    assert rows["embed_tokens/embedding"].to_ours(np.ones((130, 24))).shape == (256, 24)


def test_heads_are_split_as_in_torch() -> None:
    rows = {row.path: row for row in layout_for(SMALL, "hf-llm").rows}
    weight = np.arange(24 * 24).reshape(24, 24)  # (N * H, D) of q, and (D, N * H) of o
    x = np.arange(24)
    q = np.einsum("d,dnh->nh", x, rows["layers/attn/q_proj/kernel"].to_ours(weight))
    np.testing.assert_array_equal(q.reshape(-1), weight @ x)
    o = np.einsum("nh,nhd->d", x.reshape(4, 6), rows["layers/attn/o_proj/kernel"].to_ours(weight))
    np.testing.assert_array_equal(o, weight @ x)


def test_patch_kernel_is_the_convolution() -> None:
    row = next(row for row in layout_for(SMALL, "hf-vision").rows if row.path == "vision/patch_embed/kernel")
    weight = np.random.default_rng(0).standard_normal(row.theirs)
    patch = np.random.default_rng(1).standard_normal((14, 14, 3))
    theirs = np.einsum("oihw,hwi->o", weight, patch)
    np.testing.assert_allclose(np.einsum("hwio,hwi->o", row.to_ours(weight), patch), theirs, rtol=1e-12)


def test_other_spellings() -> None:
    llava = layout_for(model("llava-hf"), "llava-hf")
    for written, canonical in {
        "model.language_model.layers.0.mlp.up_proj.weight": "language_model.model.layers.0.mlp.up_proj.weight",
        "lm_head.weight": "language_model.lm_head.weight",
        "language_model.lm_head.weight": "language_model.lm_head.weight",
        "model.multi_modal_projector.linear_1.bias": "multi_modal_projector.linear_1.bias",
        "model.vision_tower.encoder.layers.0.mlp.fc1.bias": "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias",
        "model.vision_tower.vision_model.pre_layrnorm.bias": "vision_tower.vision_model.pre_layrnorm.bias",
        "vision_tower.embeddings.class_embedding": "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.pre_layrnorm.bias": "vision_tower.vision_model.pre_layrnorm.bias",
    }.items():
        assert llava.canonical(written) == canonical
    assert layout_for(SMALL, "hf-vision").canonical("pre_layrnorm.bias") == "vision_model.pre_layrnorm.bias"
    assert layout_for(SMALL, "hf-llm").canonical("layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    dinov2 = dataclasses.replace(SMALL, vision=DINOV2)
    assert layout_for(dinov2, "hf-vision").canonical("dinov2.embeddings.cls_token") == "embeddings.cls_token"
    convnext = layout_for(dataclasses.replace(SMALL, vision=CONVNEXT), "hf-vision")
    assert convnext.canonical("convnext.embeddings.layernorm.bias") == "embeddings.layernorm.bias"


def test_every_key_is_named_once_and_ours_alone() -> None:
    for layout in LAYOUTS:
        layout_table = layout_for(model(layout), layout)
        keys = [key for row in layout_table.rows for key in row.keys]
        assert len(keys) == len(set(keys))
        for key in keys:
            assert layout_table.canonical(key) == key
            assert not layout_table.ignores(key)


def test_what_is_ignored() -> None:
    saisa = layout_for(model("saisa", visual_layers=(0, 2)), "saisa")
    tower = "model.vision_tower.vision_tower.vision_model."
    for key in (
        "model.mm_projector.0.weight",
        "model.layers.1.mm_projector.2.bias",
        f"{tower}post_layernorm.weight",
        f"{tower}encoder.layers.2.mlp.fc1.weight",
        "model.layers.1.self_attn.rotary_emb.inv_freq",
    ):
        assert saisa.ignores(key), key
    for key in ("model.layers.0.mm_projector.0.weight", "model.mm_projector.4.weight", f"{tower}encoder.layers.3.x"):
        assert not saisa.ignores(key), key


def test_what_is_ignored_of_a_convnext() -> None:
    rows = layout_for(dataclasses.replace(SMALL, vision=CONVNEXT), "hf-vision")
    for key in ("layernorm.weight", "classifier.bias", "encoder.stages.2.layers.0.dwconv.bias"):
        assert rows.ignores(key), key
    for key in ("embeddings.layernorm.weight", "encoder.stages.1.layers.0.dwconv.bias", "encoder.stages.3.x"):
        assert not rows.ignores(key), key


@pytest.mark.parametrize("layout", ["saisa", "llava", "llava-hf"])
def test_a_layout_that_cannot_hold_the_projectors(layout: str) -> None:
    sharing = "shared" if layout == "saisa" else "per_layer"
    config = dataclasses.replace(SMALL, projector=ProjectorConfig(sharing=sharing))
    with pytest.raises(ConvertError, match=r"model\.projector\.sharing"):
        layout_for(config, layout)


def test_unknown_layout() -> None:
    with pytest.raises(ConvertError, match="known: saisa, llava"):
        layout_for(SMALL, "flax")


def test_row_of_one_layer() -> None:
    row = TensorRow("decoder", "x", "y.{i}", (2,), (2,), (0,), (3, 5))
    assert row.keys == ("y.3", "y.5") and row.shape == (2, 2)
