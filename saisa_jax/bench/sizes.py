"""Models and rows that benches measure: a picture of so many tokens, whose features are handed in, and a question."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from saisa_jax.batch import Batch
from saisa_jax.config import Config, DataConfig, FlamingoConfig, ModelConfig, ProjectorConfig, StageConfig, VisionConfig
from saisa_jax.presets import LLMS
from saisa_jax.testing.batches import IMAGE, make_batch

PATCH = 14


class Size(NamedTuple):
    """A decoder (fields of `ModelConfig`) and a row: V visual tokens of width C for each picture, and T text tokens."""

    decoder: Any
    visual: int = 576
    width: int = 1024
    text: int = 64
    images: int = 1

    @property
    def before(self) -> int:
        """Text tokens before the first picture."""
        return min(4, self.text // 2)


_MID = {
    "vocab_size": 32000,
    "embed_dim": 768,
    "num_layers": 12,
    "num_heads": 12,
    "num_kv_heads": 12,
    "head_dim": 64,
    "mlp_dim": 2048,
}
_TINY = {
    "vocab_size": 256,
    "embed_dim": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "mlp_dim": 96,
}
SIZES = {
    "mid": Size(_MID),
    "smollm2": Size(LLMS["smollm2-135m"]),
    "tiny": Size(_TINY, visual=16, width=32, text=12),
}


def of_alignment(alignment: str, layers: int) -> dict[str, Any]:
    """The fields of `ModelConfig` in which alignments differ, of a decoder of so many layers."""
    return {
        "alignment": alignment,
        "projector": ProjectorConfig(sharing="per_layer" if alignment == "saisa" else "shared"),
        "flamingo": FlamingoConfig(min(4, layers)) if alignment == "flamingo" else FlamingoConfig(),
    }


def make_config(size: Size, alignment: str, rows: int, dtype: str, attention: str = "auto") -> Config:
    """A model of that size, and stage 2 of so many rows: everything but the vision encoder trains."""
    side = round(size.visual**0.5)
    model = ModelConfig(
        **of_alignment(alignment, size.decoder["num_layers"]),
        **{
            **size.decoder,
            "max_length": max(2048, size.text + size.images * size.visual + 64),
            "dtype": dtype,
            "attention_impl": attention,
        },
        # Never run, and made all the same: one small layer.
        vision=VisionConfig(
            image_size=PATCH * side,
            patch_size=PATCH,
            embed_dim=size.width,
            num_layers=1,
            num_heads=1,
            mlp_dim=8,
            select_layer=-1,
        ),
    )
    stage = StageConfig(sharing=model.projector.sharing, batch_size=rows, text_length=size.text, max_images=size.images)
    return Config(
        name=f"bench-{alignment}", stages=("finetune",), model=model, finetune=stage, data=DataConfig(features=True)
    )


def rows_of(size: Size, model: ModelConfig, rows: int) -> Batch:
    """Rows of random text, without padding: pictures after the first few tokens."""
    rng = np.random.default_rng(0)
    layouts = [rng.integers(3, model.vocab_size, size.text).tolist() for _ in range(rows)]
    for layout in layouts:
        layout[size.before : size.before] = [IMAGE] * size.images
    return make_batch(model, layouts)


def features_of(size: Size, rows: int) -> np.ndarray:
    """Random features [B, M P, C] of the rows' pictures."""
    return np.random.default_rng(1).standard_normal((rows, size.images * size.visual, size.width), np.float32)
