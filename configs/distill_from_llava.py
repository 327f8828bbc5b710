"""LLaVA to SAISA without starting over: the checkpoint teaches a SAISA that is made of it.

    python train.py --config=configs/distill_from_llava.py:runs/llava/finetune/model --workdir=runs/distilled
    python eval.py --workdir=runs/distilled

The student has the checkpoint's decoder and encoder. Its projectors, one a layer, are fitted in closed form to what the
checkpoint's visual tokens are in each layer; then they train with cross-entropy and KL to the checkpoint on the answers
(docs/family.md). Data, template and rows are those of the checkpoint's stage 2, for a tenth of its steps. What trains
stands after a comma:

    ...:CHECKPOINT          the projectors; the decoder is in memory once
    ...:CHECKPOINT,lora     and adapters of rank 64 in the decoder
    ...:CHECKPOINT,all      and the decoder; the teacher's is in memory as well

Fewer parameters: --config.model.projector.kind=low_rank. Fewer layers: --config.model.visual_layers=0,1,7,8.
"""

import dataclasses

from ml_collections import ConfigDict

from saisa_jax.checkpoints import read_account
from saisa_jax.config import (
    ADAPTER_PATTERN,
    PROJECTOR_PATTERN,
    VISION_PATTERN,
    ConfigError,
    DistillConfig,
    GroupConfig,
    LoraConfig,
    OptimizerConfig,
    to_config_dict,
)

TRAINS = ("projectors", "lora", "all")
SHARE = 0.1  # of the steps of the checkpoint's own stage 2


def get_config(argument: str) -> ConfigDict:
    """`argument` is a finished LLaVA's directory; after a comma what trains."""
    checkpoint, _, trains = argument.partition(",")
    trains = trains or "projectors"
    if trains not in TRAINS:
        raise ConfigError(f"configs/distill_from_llava.py:{argument}: {trains!r} is none of {', '.join(TRAINS)}")
    _, before = read_account(checkpoint)

    # Answers in float16 are fine; gradients in it would need their loss scaled.
    dtype = "bfloat16" if before.model.dtype == "float16" else before.model.dtype
    frozen = (r".*", GroupConfig(frozen=True, dtype=dtype))
    rate, groups = {  # the projectors at 1e-3, as in stage 1, or 2e-4 where the decoder learns to read them
        "projectors": (1e-3, ((PROJECTOR_PATTERN, GroupConfig()), frozen)),
        "lora": (2e-4, ((ADAPTER_PATTERN, GroupConfig()), (PROJECTOR_PATTERN, GroupConfig(lr_scale=5.0)), frozen)),
        "all": (
            2e-5,
            (
                (VISION_PATTERN, GroupConfig(frozen=True, dtype=dtype)),
                (PROJECTOR_PATTERN, GroupConfig(lr_scale=10.0)),
                (r".*", GroupConfig()),
            ),
        ),
    }[trains]
    projector = dataclasses.replace(before.model.projector, sharing="per_layer")
    stage = before.finetune
    finetune = dataclasses.replace(
        stage,
        sharing="per_layer",
        steps=None if stage.steps is None else max(1, round(SHARE * stage.steps)),
        epochs=SHARE * stage.epochs,
        optimizer=OptimizerConfig(lr=rate),
        groups=groups,
        lora=LoraConfig(rank=64, alpha=128.0) if trains == "lora" else LoraConfig(),
    )
    config = dataclasses.replace(
        before,
        name=f"{before.name}-distilled",
        stages=("finetune",),
        init_from="",
        model=dataclasses.replace(before.model, alignment="saisa", dtype=dtype, projector=projector),
        data=dataclasses.replace(before.data, tokenizer=f"{checkpoint}/tokenizer"),
        finetune=finetune,
        distill=DistillConfig(teacher=checkpoint),
    )
    return to_config_dict(config)
