"""The configuration: frozen dataclasses, built from an `ml_collections.ConfigDict`.

The dataclasses of this package hold every default and every check. A recipe in `configs/` starts from
`to_config_dict(Config())` and states only what differs; `train.py` lets `--config.a.b=v` override it and hands the
result to `from_config_dict`. From there on nothing in the program reads a ConfigDict.
"""

from saisa_jax.config.checks import DTYPES, ConfigError
from saisa_jax.config.config_dict import (
    from_config_dict,
    from_saved,
    nearest_fields,
    to_config_dict,
    to_dict,
    upgrade_saved,
)
from saisa_jax.config.data import DataConfig, SourceConfig
from saisa_jax.config.devices import DistributedConfig, MeshConfig
from saisa_jax.config.distill import DistillConfig, Teacher
from saisa_jax.config.model import (
    ALIGNMENTS,
    ATTENTION_IMPLS,
    LIGHTEST_FIRST,
    PROJECTIONS,
    REMAT_POLICIES,
    ROPE_SCALINGS,
    VOCAB_MULTIPLE,
    FlamingoConfig,
    LoraConfig,
    ModelConfig,
    RopeScalingConfig,
)
from saisa_jax.config.run import Config
from saisa_jax.config.training import (
    ADAPTER_PATTERN,
    CONNECTOR_PATTERN,
    CROSS_PATTERN,
    ON_NAN,
    PROJECTOR_PATTERN,
    SCHEDULES,
    SCHOOLS,
    STAGES,
    TRAIN_ADAPTERS,
    TRAIN_ALL,
    TRAIN_ALL_BUT_VISION,
    TRAIN_PROJECTOR,
    VISION_PATTERN,
    EvaluationConfig,
    GroupConfig,
    Groups,
    OptimizerConfig,
    ProfileConfig,
    StageConfig,
    TrainingConfig,
)
from saisa_jax.config.vision import ACTIVATIONS, IMAGE_MODES, SHARINGS, SQUARE_MODES, ProjectorConfig, VisionConfig

__all__ = [
    "ACTIVATIONS",
    "ADAPTER_PATTERN",
    "ALIGNMENTS",
    "ATTENTION_IMPLS",
    "CONNECTOR_PATTERN",
    "CROSS_PATTERN",
    "DTYPES",
    "IMAGE_MODES",
    "LIGHTEST_FIRST",
    "ON_NAN",
    "PROJECTIONS",
    "PROJECTOR_PATTERN",
    "REMAT_POLICIES",
    "ROPE_SCALINGS",
    "SCHEDULES",
    "SCHOOLS",
    "SHARINGS",
    "SQUARE_MODES",
    "STAGES",
    "TRAIN_ADAPTERS",
    "TRAIN_ALL",
    "TRAIN_ALL_BUT_VISION",
    "TRAIN_PROJECTOR",
    "VISION_PATTERN",
    "VOCAB_MULTIPLE",
    "Config",
    "ConfigError",
    "DataConfig",
    "DistillConfig",
    "DistributedConfig",
    "EvaluationConfig",
    "FlamingoConfig",
    "GroupConfig",
    "Groups",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ProfileConfig",
    "ProjectorConfig",
    "RopeScalingConfig",
    "SourceConfig",
    "StageConfig",
    "Teacher",
    "TrainingConfig",
    "VisionConfig",
    "from_config_dict",
    "from_saved",
    "nearest_fields",
    "to_config_dict",
    "to_dict",
    "upgrade_saved",
]
