"""Any resolution in the files of other programs: read where they put one view behind the other, else refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from saisa_jax.__main__ import main
from saisa_jax.checkpoints import load_model, save_model
from saisa_jax.config import ModelConfig
from saisa_jax.convert.any_resolution import grids_from_llava, reasons_of_views, views_to_llava
from saisa_jax.convert.configs import config_from_hf
from saisa_jax.convert.layouts import check_says
from saisa_jax.convert.rows import ConvertError
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.models.saisa import init_params
from saisa_jax.testing.checkpoints import tiny_model, write_checkpoint
from saisa_jax.testing.configs import tiny_config

PINPOINTS = [[32, 64], [96, 32]]  # (width, height), as LLaVA says them
GRIDS = ((64, 32), (32, 96))


def read(where: Path, layout: str = "llava", **changes: Any) -> ModelConfig:
    """A directory of a layout whose config.json says these things."""
    if not where.exists():
        write_checkpoint(where, layout)
        write_checkpoint(where.parent / "tower", "hf-vision")
    raw = json.loads((where / "config.json").read_text()) | changes
    return config_from_hf(where, layout=layout, vision=where.parent / "tower", raw=raw)


def test_grids_are_read(tmp_path: Path) -> None:
    for named in (PINPOINTS, str(PINPOINTS), "[(32, 64), (96, 32)]"):
        vision = read(tmp_path / "in", image_aspect_ratio="anyres", image_grid_pinpoints=named).vision
        assert (vision.image_mode, vision.grids, vision.max_views) == ("anyres", GRIDS, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_grid_pinpoints": None}, r"image_grid_pinpoints=None is not supported: with anyres it lists pairs"),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, r"image_grid_pinpoints='\(1x1\).* lists pairs \(width, height\)"),
        ({"image_grid_pinpoints": [[40, 32]]}, r"image_grid_pinpoints: .*\(32, 40\).* multiples of .*image_size=32"),
        ({"mm_patch_merge_type": "spatial_unpad"}, r"mm_patch_merge_type='spatial_unpad' .* image_newline .*'flat'"),
        ({"image_aspect_ratio": "anyres_max_9"}, r"image_aspect_ratio='anyres_max_9' is not supported: it changes"),
    ],
)
def test_what_is_not_computed_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    said = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": PINPOINTS} | changes
    with pytest.raises(ConvertError, match=message):
        read(tmp_path / "in", **said)


@pytest.mark.parametrize("layout", ["saisa", "llava-hf"])
def test_layouts_of_one_square_an_image(layout: str, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"image_aspect_ratio='anyres' is not supported: .*take a checkpoint"):
        read(tmp_path / "in", layout, image_aspect_ratio="anyres", image_grid_pinpoints=PINPOINTS)
    model = tiny_model(layout)
    vision = dataclasses.replace(model.vision, image_mode="anyres", image_grids=GRIDS)
    with pytest.raises(ConvertError, match=r"model.vision.image_mode='anyres': "):
        check_says(dataclasses.replace(model, vision=vision), layout)
    hf = dataclasses.replace(tiny_config("saisa").model, vision=vision)
    with pytest.raises(ConvertError, match=r"image_mode='anyres': its class has one square for each image"):
        check_says(hf, "hf")


def test_grids_are_written() -> None:
    vision = dataclasses.replace(tiny_model("llava").vision, image_mode="anyres", image_grids=GRIDS)
    said = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": PINPOINTS, "mm_patch_merge_type": "flat"}
    assert views_to_llava(vision) == said and grids_from_llava(said) == GRIDS
    assert not list(reasons_of_views(vision, "llava")) and not list(reasons_of_views(vision, "hf-vision"))


@pytest.mark.slow
def test_out_and_in_again(tmp_path: Path) -> None:
    """A LLaVA of any resolution in LLaVA's layout, and its encoder alone."""
    config = tiny_config("llava")
    vision = dataclasses.replace(config.model.vision, image_mode="anyres", image_grids=GRIDS)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vision=vision))
    tokenizer = load_tokenizer("easy_vqa")
    save_model(
        tmp_path / "model",
        init_params(config.model_for("finetune"), jax.random.key(0)),
        config,
        tokenizer,
        {"stage": "finetune"},
    )
    for layout in ("llava", "hf-vision"):
        flags = ["convert", "export", f"--from={tmp_path}/model", f"--layout={layout}", f"--to={tmp_path}/{layout}"]
        assert main(flags) == 0
    written = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert written["image_aspect_ratio"] == "anyres" and written["image_grid_pinpoints"] == PINPOINTS
    assert written["mm_patch_merge_type"] == "flat"
    assert main(["convert", "import", f"--from={tmp_path}/llava", f"--to={tmp_path}/back"]) == 0
    params, back, _, _ = load_model(tmp_path / "back")
    assert back.model.vision.grids == config_from_hf(tmp_path / "hf-vision", layout="hf-vision").vision.grids == GRIDS
    ours = load_model(tmp_path / "model")[0]
    np.testing.assert_array_equal(params["visual_proj"]["fc1"]["kernel"], ours["visual_proj"]["fc1"]["kernel"])
