"""What the paper's recipes have in common: LLaVA-1.5's data and hyper-parameters, in two stages.

The numbers are written out, also where they are the defaults: this page is the recipe.

The data lie where LLaVA's instructions put them:

    data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json     and its images/ beside it
    data/llava_v1_5_mix665k.json                        data/images/{coco,gqa,ocr_vqa,textvqa,vg}/...
"""

import dataclasses

from ml_collections import ConfigDict

from saisa_jax.config import (
    STAGES,
    TRAIN_ALL_BUT_VISION,
    TRAIN_PROJECTOR,
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SourceConfig,
    StageConfig,
    TrainingConfig,
    to_config_dict,
)

# AdamW without decay, a cosine after 3% of warm-up, gradients clipped to norm 1.
ADAMW = OptimizerConfig(
    lr=2e-5, schedule="cosine", warmup_fraction=0.03, weight_decay=0.0, b1=0.9, b2=0.999, eps=1e-8, clip_norm=1.0
)

# Rows are packed: with these shapes (rows of a step, T text tokens, M image slots) a step of samples as long as the
# paper's is assumed to hold 256 of them in stage 1 and 127 in stage 2 (the paper: 256 and 128). Among the shapes whose
# rows divide over 8 and 16 chips they cost least a sample (`python -m saisa_jax rows`).

# Stage 1, alignment: captions teach one shared projector; everything else is frozen.
PRETRAIN = StageConfig(
    sources=(
        SourceConfig("llava", "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", images="data/LLaVA-Pretrain/images"),
    ),
    template="plain",
    sharing="shared",
    epochs=1.0,
    batch_size=32,
    text_length=192,
    max_images=8,
    optimizer=dataclasses.replace(ADAMW, lr=1e-3),
    groups=TRAIN_PROJECTOR,
)

# Stage 2, visual instructions: the decoder and the projectors train, the vision encoder is frozen. `recipe` sets the
# template, and the sharing of projectors that the model names (SAISA: one a layer).
FINETUNE = StageConfig(
    sources=(SourceConfig("llava", "data/llava_v1_5_mix665k.json", images="data/images"),),
    epochs=1.0,
    batch_size=16,
    text_length=2048,
    max_images=8,
    optimizer=dataclasses.replace(ADAMW, lr=2e-5),
    groups=TRAIN_ALL_BUT_VISION,
)

# Logits of a whole row at once. Under fsdp every piece of the loss gathers the head and reduces its gradient anew: for
# 7B on 16 chips a chip receives 3.7 GiB a step in pieces of 512 positions, and 0.7 in one; the peak of memory, which is
# in the layers, is the same.
LOSS_CHUNK = 2048


def recipe(name: str, model: ModelConfig, start: str, stage: str | None, template: str = "vicuna_v1") -> ConfigDict:
    """The paper's two stages.

    Args:
      name: of the run.
      model: from `saisa_jax.presets`.
      start: the directory that `convert import` made of the decoder and the encoder.
      stage: the recipe's argument: pretrain, finetune, or None for both.
      template: how stage 2 writes a conversation.
    """
    if stage is not None and stage not in STAGES:
        raise ConfigError(f"configs/{name}.py:{stage} is unknown; known: {', '.join(STAGES)}; without one: both")
    # The context of LLaVA-1.5. The backward pass computes no more of the layers again than the memory asks for.
    model = dataclasses.replace(model, max_length=2048, remat_policy="auto")
    config = Config(
        name=name,
        stages=STAGES if stage is None else (stage,),
        init_from=start,
        model=model,
        data=DataConfig(tokenizer=f"{start}/tokenizer", packing=True, on_long="truncate"),
        pretrain=PRETRAIN,
        finetune=dataclasses.replace(FINETUNE, template=template, sharing=model.projector.sharing),
        training=TrainingConfig(loss_chunk=LOSS_CHUNK),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
    return to_config_dict(config)
