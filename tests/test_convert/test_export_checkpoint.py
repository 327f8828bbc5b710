"""What a layout cannot say of a model is refused, all of it, before anything is written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from saisa_jax.__main__ import main
from saisa_jax.checkpoints import read_account, save_model
from saisa_jax.config import Config, ModelConfig, ProjectorConfig, from_saved, to_dict
from saisa_jax.convert.layouts import LAYOUTS, MULTIMODAL
from saisa_jax.convert.rows import ConvertError
from saisa_jax.convert.write import export_params
from saisa_jax.errors import UserError
from saisa_jax.models.saisa import abstract_params
from saisa_jax.testing.checkpoints import tiny_model
from saisa_jax.testing.configs import tiny_config

HELD = {  # the parts of each layout
    "saisa": ("decoder", "projector", "vision"),
    "llava": ("decoder", "projector", "vision"),
    "llava-hf": ("decoder", "projector", "vision"),
    "hf": ("decoder", "projector", "vision"),
    "hf-llm": ("decoder",),
    "hf-vision": ("vision",),
}


def zeros(config: ModelConfig) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_params(config))


def unknown(config: ModelConfig) -> dict[str, str]:
    """A parameter for each part that no layout has heard of."""
    projector = "layers/visual_proj" if config.per_layer_projectors else "visual_proj"
    return {"decoder": "layers/attn/q_norm/scale", "projector": f"{projector}/gate", "vision": "vision/registers"}


def with_unknown(params: Any, paths: list[str]) -> Any:
    flat = flatten_dict(params, sep="/")
    return unflatten_dict({**flat, **{path: np.zeros((2, 3), np.float32) for path in paths}}, sep="/")


@pytest.mark.parametrize("part", ["decoder", "projector", "vision"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_parameter_without_a_place(layout: str, part: str, tmp_path: Path) -> None:
    model = tiny_model(layout)
    path = unknown(model)[part]
    params = with_unknown(zeros(model), [path])
    if part not in HELD[layout]:  # nobody asked for that part
        assert export_params(params, model, layout, tmp_path / "out")
        return
    with pytest.raises(ConvertError, match=rf"no place   {path} \[2, 3\]"):
        export_params(params, model, layout, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def finished(directory: Path, config: Config, params: Any) -> Path:
    save_model(directory, params, config, None, {"stage": "finetune"})
    return directory


def export(source: Path, layout: str, to: Path) -> int:
    return main(["convert", "export", f"--from={source}", f"--layout={layout}", f"--to={to}"])


def test_all_parameters_without_a_place_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tower of its own folder is looked at before the decoder is written."""
    config = tiny_config("saisa")
    names = unknown(config.model)
    for part, paths in {
        "both": [names["decoder"], names["projector"]],
        "tower": [names["vision"]],
    }.items():
        source = finished(tmp_path / part, config, with_unknown(zeros(config.model), paths))
        assert export(source, "saisa", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert all(f"no place   {path}" in error for path in paths)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"both", part})


def changed(alignment: str, vision: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    model = tiny_config(alignment).model
    return dataclasses.replace(model, vision=dataclasses.replace(model.vision, **(vision or {})), **changes)


SHARED = ProjectorConfig(sharing="shared")
FINAL_NORM = {"post_norm": True, "select_layer": -1}
REGISTERS = {
    "family": "dinov2_with_registers",
    "pre_norm": False,
    "patch_bias": True,
    "layer_scale": True,
    "num_registers": 2,
}


@pytest.mark.parametrize(
    ("layouts", "model", "reason"),
    [
        (("llava", "llava-hf"), changed("naavit"), r"alignment='naavit': its readers compute 'llava'.* another model"),
        (
            MULTIMODAL,
            changed("flamingo"),
            r"alignment='flamingo': it has no place for cross layers; hf-llm and hf-vision",
        ),
        (("llava", "llava-hf"), changed("saisa", projector=SHARED), r"alignment='saisa': its readers compute 'llava'"),
        (("llava", "llava-hf"), changed("llava", FINAL_NORM), r"post_norm=True: its readers take .* before"),
        (("saisa",), changed("saisa", FINAL_NORM), r"post_norm=True: its readers take .* before"),
        (("llava", "llava-hf"), changed("llava", {"select_layer": 0}), r"select_layer=0: .* without any layer"),
        (
            ("llava", "llava-hf"),
            changed("llava", frozen_visual_layers=(1,)),
            r"frozen_visual_layers=\[1\]: to its readers",
        ),
        (
            ("saisa",),
            changed("saisa", projector=ProjectorConfig("low_rank")),
            r"kind='low_rank': its projectors are",
        ),
        (
            ("llava", "llava-hf"),
            changed("llava", projector=ProjectorConfig("resampler", "shared", num_tokens=3)),
            r"kind='resampler': its projectors are",
        ),
        (("saisa", "hf"), changed("saisa", frozen_prefix=True), r"frozen_prefix=True: its readers let text"),
        (("saisa",), changed("saisa", visual_layers=(1,)), r"visual_layers=\[1\]: .* make up the projectors"),
        (
            ("llava", "llava-hf"),
            changed("llava", projector=ProjectorConfig(sharing="shared", hidden_dim=16)),
            r"projectors are 32 wide inside, not 16",
        ),
        (
            ("hf-llm",),
            changed("saisa", qkv_bias=True, sliding_window=9),
            r"no family of decoders .* has what model.qkv_bias=True and model.sliding_window=9 say together",
        ),
        (("hf-vision",), changed("saisa", {"pre_norm": False}), r"family='clip' is not .*: pre_norm=False"),
        (
            ("hf-vision", "saisa"),
            changed("saisa", {"family": "siglip", "pre_norm": False, "patch_bias": True}),
            r"family='siglip' is not .*: class_token=True",
        ),
        (("saisa",), changed("saisa", REGISTERS), r"num_registers=2: to its readers they are patches"),
        (
            ("hf-vision",),
            changed("saisa", {"family": "resnet"}),
            r"model.vision.family='resnet' is not one of clip, convnext",
        ),
    ],
)
def test_another_model_than_the_layout_says(
    layouts: tuple[str, ...], model: ModelConfig, reason: str, tmp_path: Path
) -> None:
    params = zeros(model)
    for layout in layouts:
        with pytest.raises(UserError, match=reason):
            export_params(params, model, layout, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_of_cross_layers_the_parts_that_have_a_layout(tmp_path: Path) -> None:
    """A decoder and an encoder go out without what joins them."""
    for layout in ("hf-llm", "hf-vision"):
        crossed, plain = (
            export_params(zeros(model), model, layout, tmp_path / f"{layout} of {model.alignment}")
            for model in (changed("flamingo"), changed("llava"))
        )
        assert [path.read_bytes() for path in crossed] == [path.read_bytes() for path in plain]


@pytest.mark.parametrize(
    ("vision", "family"),
    [
        ({}, "clip"),
        ({"pre_norm": False, "class_token": False}, "siglip"),
        ({"pre_norm": False, "layer_scale": True}, "dinov2"),
    ],
)
def test_models_saved_before_families_had_a_name(vision: dict[str, Any], family: str, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config(), model=changed("saisa", vision))
    raw = json.loads(json.dumps(to_dict(config)))
    del raw["model"]["vision"]["family"]
    assert from_saved(raw).model.vision.family == family
    source = finished(tmp_path / "old", config, zeros(config.model))
    (source / "config.json").write_text(json.dumps(raw))
    assert read_account(source)[1].model.vision.family == family
