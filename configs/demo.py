"""The demo: SAISA in its two stages on easy-VQA, from random weights, on two CPU cores.

    python train.py --config=configs/demo.py --workdir=runs/demo
    python eval.py --workdir=runs/demo

The argument picks a member of the family (docs/family.md), each with the same recipe, size and budget:

    python train.py --config=configs/demo.py:llava --workdir=runs/family/llava

`make demo-family` trains and compares them all.
"""

from ml_collections import ConfigDict

from saisa_jax.config import (
    TRAIN_ALL,
    Config,
    ConfigError,
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

PER_LAYER, SHARED = ProjectorConfig(sharing="per_layer"), ProjectorConfig(sharing="shared")
VARIANTS = {  # fields of ModelConfig
    "saisa": {"projector": PER_LAYER},
    "shared": {"projector": SHARED},
    "low_rank": {"projector": ProjectorConfig("low_rank", rank=16)},
    "resampler": {"projector": ProjectorConfig("resampler", num_tokens=16, num_layers=1, num_heads=4)},
    "vica": {"projector": SHARED, "visual_layers": (0, 1)},
    "naavit": {"projector": SHARED, "alignment": "naavit"},
    "llava": {"projector": SHARED, "alignment": "llava"},
    # Two cross layers of a decoder with four, under casa with the text beside the image.
    "flamingo": {"projector": SHARED, "alignment": "flamingo", "flamingo": FlamingoConfig(2)},
    "casa": {"projector": SHARED, "alignment": "flamingo", "flamingo": FlamingoConfig(2, local_text=True)},
    "blind": {"projector": PER_LAYER},
}


def get_config(variant: str = "saisa") -> ConfigDict:
    if variant not in VARIANTS:
        raise ConfigError(f"configs/demo.py:{variant} is unknown; known: {', '.join(VARIANTS)}")

    vision = VisionConfig(
        family="siglip",
        image_size=64,
        patch_size=8,
        embed_dim=128,
        num_layers=3,
        num_heads=4,
        mlp_dim=256,
        activation="gelu",
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        select_layer=-1,
        post_norm=True,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        image_mode="resize",
    )
    model = ModelConfig(
        vocab_size=128,
        embed_dim=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        mlp_dim=256,
        max_length=256,
        dtype="float32",
        remat_policy="names",  # on CPUs computing again is quicker than writing and reading
        vision=vision,
        **VARIANTS[variant],
    )
    # At twice this rate and at half of it the encoder learns later to tell shapes apart.
    optimizer = OptimizerConfig(lr=7e-4, warmup_fraction=0.05, b2=0.98, weight_decay=0.05)
    config = Config(
        name=f"demo-{variant}",
        model=model,
        data=DataConfig(system_prompt="", packing=False, turns_per_sample=4, augment=True, blind=variant == "blind"),
        # Stage 1: captions. Everything starts from random weights, so everything trains.
        pretrain=StageConfig(
            sources=(SourceConfig("easy_vqa", task="caption"),),
            validation=(SourceConfig("easy_vqa", task="caption", split="validation"),),
            template="plain",
            sharing="shared",
            batch_size=32,
            text_length=16,
            steps=800,
            optimizer=optimizer,
            groups=TRAIN_ALL,
        ),
        # Stage 2: questions, four of an image in one conversation.
        finetune=StageConfig(
            sources=(SourceConfig("easy_vqa"),),
            validation=(SourceConfig("easy_vqa", split="validation"),),
            template="vicuna_v1",
            sharing=model.projector.sharing,
            batch_size=16,
            text_length=68,
            steps=1800,
            optimizer=optimizer,
            groups=TRAIN_ALL,
        ),
        training=TrainingConfig(log_every=50, eval_every=200, eval_batches=8, checkpoint_every=500),
        evaluation=EvaluationConfig(tasks=("easy_vqa",), batch_size=256, max_new_tokens=4),
    )
    return to_config_dict(config)
