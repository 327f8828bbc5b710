"""Random checkpoints in other people's layouts, of any size: for tests of conversion and of its memory.

python -m saisa_jax.testing.checkpoints DIRECTORY GIGABYTES   # an LLM of about that size in bfloat16
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from saisa_jax.config import ModelConfig
from saisa_jax.convert.configs import decoder_to_hf, multimodal_to_hf, preprocessor_to_hf, vision_to_hf
from saisa_jax.convert.files.safetensors import DTYPES
from saisa_jax.convert.layouts import layout_for
from saisa_jax.convert.rows import PARTS
from saisa_jax.convert.write import SHARD_BYTES, write_shards
from saisa_jax.data.text.tokenizer import train_tokenizer
from saisa_jax.testing.configs import tiny_config


class RandomTensors:
    """Tensors of given shapes that are made when they are read."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: str = "F32"):
        self.where = Path("random")
        self._shapes, self._dtype = shapes, dtype

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key]

    def dtype_name(self, key: str) -> str:
        return self._dtype

    def is_float(self, key: str) -> bool:
        return True

    def read(self, key: str) -> np.ndarray:
        random = np.random.default_rng(zlib.crc32(key.encode()))
        scale = 1 / math.sqrt(self._shapes[key][-1])
        return (random.standard_normal(self._shapes[key], np.float32) * scale).astype(DTYPES[self._dtype])


def tiny_model(layout: str) -> ModelConfig:
    """The tests' tiny model in the shape of a layout."""
    return tiny_config("llava" if layout in ("llava", "llava-hf") else "saisa").model


def write_checkpoint(
    directory: Path,
    layout: str,
    model: ModelConfig | None = None,
    *,
    parts: tuple[str, ...] = PARTS,
    dtype: str = "BF16",
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Writes tensors, config.json and the demo's tokenizer, with tensors that the model never reads among them.

    Returns:
      The content of its config.json.
    """
    model = model or tiny_model(layout)
    whole = dataclasses.replace(model.vision, select_layer=-1, post_norm=True)  # with the layers that are not used
    rows = layout_for(dataclasses.replace(model, vision=whole), layout).only(parts)
    shapes = {key: row.theirs for row in rows for key in row.keys}
    if layout == "saisa":
        width, dim = model.vision.embed_dim, model.embed_dim
        shapes |= {"model.mm_projector.0.weight": (dim, width), "model.mm_projector.2.weight": (dim, dim)}
    tensors = RandomTensors(shapes, dtype)
    directory.mkdir(parents=True)
    write_shards({key: (tensors, key) for key in tensors.names}, directory, shard_bytes)
    if layout == "hf-vision":
        raw = vision_to_hf(model.vision)
        (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor_to_hf(model.vision)))
    elif layout == "hf-llm":
        raw = decoder_to_hf(model)
    else:
        raw = multimodal_to_hf(model, layout, tower="vision_tower", image_token=1)
    (directory / "config.json").write_text(json.dumps(raw))
    if layout != "hf-vision":
        train_tokenizer().save_pretrained(directory)
    return raw


def llm_of(gigabytes: float) -> ModelConfig:
    """A decoder with as many layers as make about that size in bfloat16, in the proportions of Llama."""
    width, mlp = 1024, 2816
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * 32000 * width) / (4 * width**2 + 3 * width * mlp)))
    return dataclasses.replace(
        ModelConfig(),
        embed_dim=width,
        mlp_dim=mlp,
        num_heads=8,
        num_kv_heads=8,
        num_layers=layers,
    )


if __name__ == "__main__":
    write_checkpoint(Path(sys.argv[1]), "hf-llm", llm_of(float(sys.argv[2])))
