"""Any resolution (`model.vision.image_mode=anyres`) as the files of LLaVA and its successors say it.

LLaVA's own program puts the views of an image one after the other where `mm_patch_merge_type` is `flat`: as here. The
weights of LLaVA-NeXT (1.6) that are published say `spatial_unpad`: their tiles are merged row by row, cut to the
picture, and a learned vector `image_newline` ends each row. That is another sequence, and is not computed here.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from saisa_jax.config import ConfigError, VisionConfig
from saisa_jax.convert.rows import ConvertError

MERGED = "its tiles are merged with image_newline at the end of each row (spatial_unpad), and here they stay whole"
ONE_SQUARE = {  # layouts whose readers take one square for each image, and what they do with more
    "hf": "its class has one square for each image",
    "llava-hf": f"transformers' LLaVA has one square for each image; of LLaVA-NeXT {MERGED}",
    "saisa": "the authors' program fails on several crops of an image",
}
FEATURE_GRIDS = "vision_image_grids"  # in the config.json of an encoder that is exported alone


def reasons_of_views(vision: VisionConfig, layout: str) -> Iterator[str]:
    """Why a layout cannot say how images become several."""
    if vision.grids and layout in ONE_SQUARE:
        yield f"model.vision.image_mode={vision.image_mode!r}: {ONE_SQUARE[layout]}"


def refusal(raw: Mapping[str, Any], layout: str) -> tuple[str, Any, str] | None:
    """(field, value, why) of what a config.json says of any resolution that is not computed here; None: all is."""
    ratio, merge = str(raw.get("image_aspect_ratio")), raw.get("mm_patch_merge_type") or "flat"
    instead = (
        "take a checkpoint of LLaVA-1.5 (pad or square), or one trained with anyres and mm_patch_merge_type='flat'"
    )
    if merge != "flat":
        return "mm_patch_merge_type", merge, f"{MERGED}; {instead}"
    if ratio == "anyres" and layout == "llava":
        try:
            grids_from_llava(raw)
        except (ValueError, SyntaxError, TypeError):
            value = raw.get("image_grid_pinpoints")
            return "image_grid_pinpoints", value, f"with anyres it lists pairs (width, height) in pixels; {instead}"
        return None
    if "anyres" in ratio:
        why = ONE_SQUARE.get(layout, "it changes the size of what the encoder has read of a large image")
        return "image_aspect_ratio", raw["image_aspect_ratio"], f"{why}; {instead}"
    if raw.get("image_grid_pinpoints"):
        return "image_grid_pinpoints", raw["image_grid_pinpoints"], f"of LLaVA-NeXT {MERGED}; {instead}"
    return None


def grids_from_llava(raw: Mapping[str, Any]) -> tuple[tuple[int, int], ...] | None:
    """`model.vision.image_grids` (height, width), of a config.json that names (width, height), or its text; None: not
    of any resolution.

    Raises:
      ValueError, SyntaxError, TypeError: something else.
    """
    if raw.get("image_aspect_ratio") != "anyres":
        return None
    named = raw.get("image_grid_pinpoints")
    pairs = ast.literal_eval(named) if isinstance(named, str) else named
    grids = tuple((int(height), int(width)) for width, height in pairs)
    if not grids:
        raise ValueError("no grid")
    return grids


def with_grids(tower: VisionConfig, raw: Mapping[str, Any], where: Path) -> VisionConfig:
    """The tower with the grids of a config.json in LLaVA's layout, if that is of any resolution.

    Raises:
      ConvertError: grids that are no multiples of its images.
    """
    if not (grids := grids_from_llava(raw)):
        return tower
    try:
        return dataclasses.replace(tower, image_mode="anyres", image_grids=grids)
    except ConfigError as error:
        raise ConvertError(f"{where}: image_grid_pinpoints: {error}") from error


def views_to_llava(vision: VisionConfig) -> dict[str, Any]:
    """The fields of a config.json in LLaVA's layout that say how images become squares."""
    if not vision.grids:
        return {"image_aspect_ratio": "pad" if vision.image_mode == "pad" else "square", "mm_patch_merge_type": "flat"}
    pinpoints = [[width, height] for height, width in vision.grids]
    return {"image_aspect_ratio": "anyres", "image_grid_pinpoints": pinpoints, "mm_patch_merge_type": "flat"}
