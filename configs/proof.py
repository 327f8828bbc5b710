r"""The proof: SAISA beside its family on real weights and pictures, each by the same recipe and on the same samples.

    make proof-start                                              # weights and pictures, in runs/proof
    python train.py --config=configs/proof.py:saisa --workdir=runs/proof/saisa
    python eval.py --workdir=runs/proof/saisa --tasks=drawings --data=runs/proof/drawings

The argument is VARIANT[,ROOT[,DATA]]. VARIANT is one of saisa, naavit, llava, low_rank, vica and blind (SAISA that
never sees a picture). ROOT holds `start` (SmolLM2-135M-Instruct and DINOv2-small, or whatever else `convert import` has
put together) and what DATA names: `drawings` (of `data drawings`; the default) or `features` (what `data prepare
--features` has made of them).

Stage 1 trains the projector on captions, stage 2 projectors and decoder on questions; the encoder is frozen, and every
variant reads the same samples in the same rows.
"""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from saisa_jax.checkpoints import read_account
from saisa_jax.config import (
    PROJECTOR_PATTERN,
    STAGES,
    VISION_PATTERN,
    Config,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    GroupConfig,
    ModelConfig,
    OptimizerConfig,
    ProjectorConfig,
    SourceConfig,
    StageConfig,
    TrainingConfig,
    to_config_dict,
)

VICA_LAYERS = (0, 1, 7, 8, 9, 10, 11, 14)  # ViCA's own choice for 32 layers, of which SmolLM2-135M has 30
VARIANTS = {  # fields of ModelConfig
    "saisa": {"alignment": "saisa", "projector": ProjectorConfig(sharing="per_layer")},
    "naavit": {"alignment": "naavit", "projector": ProjectorConfig(sharing="shared")},
    "llava": {"alignment": "llava", "projector": ProjectorConfig(sharing="shared")},
    "low_rank": {"alignment": "saisa", "projector": ProjectorConfig("low_rank", rank=64)},
    "vica": {"alignment": "saisa", "projector": ProjectorConfig(sharing="shared"), "visual_layers": VICA_LAYERS},
    "blind": {"alignment": "saisa", "projector": ProjectorConfig(sharing="per_layer")},
}

FROZEN = GroupConfig(frozen=True)  # float32, as everything: bfloat16 is slower on most CPUs


def get_config(argument: str = "saisa") -> ConfigDict:
    given = argument.split(",", 2)
    variant, root, data = given + ["saisa", "runs/proof", "drawings"][len(given) :]
    if variant not in VARIANTS or data not in ("drawings", "features"):
        raise ConfigError(
            f"configs/proof.py:{argument} is no VARIANT[,ROOT[,DATA]]; variants: {', '.join(VARIANTS)}; data: "
            "drawings, features"
        )
    where = Path(root)

    def source(name: str) -> SourceConfig:
        if data == "features":
            return SourceConfig("arrayrecord", str(where / "features" / name))
        return SourceConfig("llava", str(where / "drawings" / f"{name}.json"), images=str(where / "drawings/images"))

    model = start_model(where / "start", VARIANTS[variant])
    adam = OptimizerConfig(lr=3e-3, schedule="cosine", warmup_fraction=0.05, b2=0.99)
    config = Config(
        name=f"proof-{variant}",
        # In stage 1 nothing of a blind model would learn: its projector is never read.
        stages=("finetune",) if variant == "blind" else STAGES,
        allow_random_init=variant == "blind",
        init_from=str(where / "start"),
        model=model,
        data=DataConfig(
            tokenizer=str(where / "start/tokenizer"),
            system_prompt="",
            blind=variant == "blind",
            features=data == "features",
        ),
        # Stage 1: captions teach one projector for all layers. Rows of four pictures are those that cost least a sample
        # in both stages (`python -m saisa_jax rows`); one row a step, as steps are what so few samples lack.
        pretrain=StageConfig(
            sources=(source("captions"),),
            validation=(source("captions_validation"),),
            template="plain",
            sharing="shared",
            batch_size=1,
            text_length=64,
            max_images=4,
            optimizer=adam,
            groups=((PROJECTOR_PATTERN, GroupConfig()), (r".*", FROZEN)),
        ),
        # Stage 2: questions. A rate for a small decoder; the paper's 2e-5 is for one of 7B.
        finetune=StageConfig(
            sources=(source("train"),),
            validation=(source("validation"),),
            template="chatml",
            sharing=model.projector.sharing,
            batch_size=1,
            text_length=128,
            max_images=4,
            optimizer=dataclasses.replace(adam, lr=2e-4),
            groups=((VISION_PATTERN, FROZEN), (r".*", GroupConfig())),
        ),
        training=TrainingConfig(
            log_every=10, eval_every=200, eval_batches=8, checkpoint_every=200, checkpoint_every_minutes=10.0
        ),
        evaluation=EvaluationConfig(tasks=("drawings",), batch_size=32, max_new_tokens=12),
    )
    return to_config_dict(config)


def start_model(start: Path, fields: dict) -> ModelConfig:
    """The imported decoder and encoder as a variant; of its visual layers those that a smaller decoder has."""
    model = read_account(str(start))[1].model
    layers = fields.get("visual_layers")
    if layers:
        fields = fields | {"visual_layers": tuple(layer for layer in layers if layer < model.num_layers)}
    return dataclasses.replace(model, dtype="float32", max_length=1024, **fields)
