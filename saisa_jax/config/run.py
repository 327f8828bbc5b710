"""One run's configuration."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from saisa_jax.config.checks import check, choice
from saisa_jax.config.data import DataConfig
from saisa_jax.config.devices import DistributedConfig, MeshConfig
from saisa_jax.config.distill import DistillConfig, Teacher, check_distillation, teacher_of
from saisa_jax.config.model import ModelConfig
from saisa_jax.config.training import (
    STAGES,
    TRAIN_PROJECTOR,
    EvaluationConfig,
    OptimizerConfig,
    ProfileConfig,
    StageConfig,
    TrainingConfig,
)


@dataclass(frozen=True)
class Config:
    """One run: one model, one or two stages of training, one evaluation."""

    name: str = "saisa"
    seed: int = 0
    stages: tuple[str, ...] = STAGES
    init_from: str = ""  # a finished model, or WORKDIR@STEP of a run, to start from; "": random weights
    allow_random_init: bool = False  # stage 2 alone may start from random projectors
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pretrain: StageConfig = field(
        default_factory=lambda: StageConfig(
            template="plain",
            sharing="shared",
            batch_size=256,
            optimizer=OptimizerConfig(lr=1e-3),
            groups=TRAIN_PROJECTOR,
        )
    )
    finetune: StageConfig = field(default_factory=StageConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        for stage in self.stages:
            choice("stages", stage, STAGES)
        check(len(self.stages) > 0, "stages is empty: name pretrain, finetune or both")
        check(
            list(self.stages) == sorted(set(self.stages), reverse=True),
            f"stages={self.stages}: pretrain comes before finetune, each once",
        )
        check(self.seed >= 0, f"seed={self.seed} must not be negative")
        check(
            self.model.projector.sharing == self.finetune.sharing,
            f"model.projector.sharing={self.model.projector.sharing} is not what stage 2 trains, "
            f"finetune.sharing={self.finetune.sharing}: set both alike",
        )
        check(
            self.model.projector.kind != "low_rank" or self.finetune.sharing == "per_layer",
            "model.projector.kind=low_rank trains a part for each layer in stage 2: set finetune.sharing=per_layer and "
            "model.projector.sharing=per_layer, or model.projector.kind=mlp",
        )
        check(self.model.lora.rank == 0, "model.lora belongs to a stage: set finetune.lora")
        check(
            not (self.data.augment and self.model.vision.max_views > 1),
            "data.augment mirrors and moves each image slot by itself, and model.vision.image_mode=anyres cuts an "
            "image into several: set data.augment=False",
        )
        check(not self.model.vision.precomputed, "model.vision.precomputed belongs to the data: set data.features")
        if self.model.alignment != "saisa":
            for stage in self.stages:
                check(
                    getattr(self, stage).sharing == "shared",
                    f"model.alignment={self.model.alignment!r} has one projector: set {stage}.sharing=shared",
                )

        check_distillation(self.distill, self.model, self.finetune.sharing, self.stages, self.init_from)

    @property
    def teacher(self) -> Teacher | None:
        """Of stage 2; None: there is none."""
        return teacher_of(self.distill, self.trained_model("finetune"), self.init_from)

    def stage(self, name: str) -> StageConfig:
        return getattr(self, name)

    def trained_model(self, stage: str) -> ModelConfig:
        """The model while stage `stage` trains it: with the adapters that are merged into it at the end, and on
        features where the data hold them."""
        vision = dataclasses.replace(self.model.vision, precomputed=self.data.features)
        return dataclasses.replace(self.model_for(stage), lora=self.stage(stage).lora, vision=vision)

    def model_for(self, stage: str) -> ModelConfig:
        """The model as stage `stage` leaves it: its own sharing of projectors."""
        projector = dataclasses.replace(self.model.projector, sharing=self.stage(stage).sharing)
        return dataclasses.replace(self.model, projector=projector)
