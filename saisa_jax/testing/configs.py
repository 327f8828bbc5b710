"""Configurations small enough for a test: whole runs in seconds on a CPU.

python train.py --config=saisa_jax/testing/configs.py:llava --workdir=...
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from saisa_jax.config import (
    TRAIN_ALL,
    Config,
    DataConfig,
    EvaluationConfig,
    FlamingoConfig,
    ModelConfig,
    OptimizerConfig,
    ProjectorConfig,
    SourceConfig,
    StageConfig,
    TrainingConfig,
    VisionConfig,
    to_config_dict,
)

FLAMINGOS = {"flamingo": FlamingoConfig(every=2), "casa": FlamingoConfig(every=1, local_text=True)}
PROJECTORS = {  # of SAISA, by the name of the variant
    "low_rank": ProjectorConfig("low_rank", rank=8),
    "resampler": ProjectorConfig("resampler", num_tokens=5),
}


def tiny_config(alignment: str = "saisa", *, blind: bool = False) -> Config:
    """Two layers of width 32 on 32 x 32 pixel images of easy-VQA; three steps of eight rows in each stage, float32.

    Args:
      alignment: saisa | naavit | llava, or a name in FLAMINGOS or PROJECTORS.
      blind: leave every image slot empty.
    """
    name = alignment
    alignment = "saisa" if name in PROJECTORS else "flamingo" if name in FLAMINGOS else name
    sharing = "per_layer" if alignment == "saisa" else "shared"
    vision = VisionConfig(
        image_size=32,
        patch_size=8,
        embed_dim=32,
        num_layers=2,
        num_heads=2,
        mlp_dim=64,
        activation="gelu",
        image_mode="resize",
    )
    model = ModelConfig(
        alignment=alignment,
        vocab_size=128,
        embed_dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=64,
        max_length=128,
        dtype="float32",
        vision=vision,
        projector=PROJECTORS.get(name, ProjectorConfig(sharing=sharing)),
        flamingo=FLAMINGOS.get(name, FlamingoConfig()),
    )
    optimizer = OptimizerConfig(lr=1e-3)
    return Config(
        name=f"tiny-{name}",
        allow_random_init=True,
        model=model,
        data=DataConfig(packing=False, turns_per_sample=1, blind=blind, num_threads=0, prefetch=1),
        pretrain=StageConfig(
            sources=(SourceConfig("easy_vqa", task="caption"),),
            validation=(SourceConfig("easy_vqa", task="caption", split="validation"),),
            template="plain",
            sharing="shared",
            batch_size=8,
            text_length=16,
            steps=3,
            optimizer=optimizer,
            groups=TRAIN_ALL,
        ),
        finetune=StageConfig(
            sources=(SourceConfig("easy_vqa"),),
            validation=(SourceConfig("easy_vqa", split="validation"),),
            sharing=sharing,
            batch_size=8,
            text_length=64,
            steps=3,
            optimizer=optimizer,
            groups=TRAIN_ALL,
        ),
        training=TrainingConfig(
            log_every=1, eval_every=2, eval_batches=1, eval_samples=1, checkpoint_every=2, tensorboard=False
        ),
        evaluation=EvaluationConfig(tasks=("easy_vqa",), batch_size=8, max_new_tokens=2, limit=8),
    )


def packed_config() -> Config:
    """Both stages on packed rows, a checkpoint at every step, the last two kept: for runs that are killed."""
    config = tiny_config()
    row = {"text_length": 128, "max_images": 4, "steps": 6}
    return dataclasses.replace(
        config,
        name="tiny-packed",
        data=dataclasses.replace(config.data, packing=True, turns_per_sample=None, system_prompt=""),
        pretrain=dataclasses.replace(config.pretrain, **row),
        finetune=dataclasses.replace(config.finetune, **row),
        training=dataclasses.replace(config.training, checkpoint_every=1, eval_samples=0, tensorboard=True),
    )


def get_config(variant: str = "saisa") -> ConfigDict:
    """The same as a recipe for `--config`.

    `variant` is an alignment, a name in FLAMINGOS or PROJECTORS, `blind` for SAISA without images, or `packed`.
    """
    if variant == "packed":
        return to_config_dict(packed_config())
    blind = variant == "blind"
    return to_config_dict(tiny_config("saisa" if blind else variant, blind=blind))
