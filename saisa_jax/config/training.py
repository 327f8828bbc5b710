"""Training's part of the configuration: stages, optimizer, what trains, the loop."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from saisa_jax.config.checks import DTYPES, ConfigError, check, choice, positive
from saisa_jax.config.data import SourceConfig
from saisa_jax.config.model import LoraConfig
from saisa_jax.config.vision import SHARINGS

STAGES = ("pretrain", "finetune")  # in this order
SCHEDULES = ("cosine", "linear", "constant")
ON_NAN = ("stop", "skip")
SCHOOLS = ("llava", "lmms")  # of prompts and scores: LLaVA's guide, which the paper follows; lmms-eval


@dataclass(frozen=True)
class GroupConfig:
    """How one group of parameters trains."""

    frozen: bool = False
    lr_scale: float = 1.0
    weight_decay: float | None = None  # None: the optimizer's; norms and biases never decay
    dtype: str = "float32"  # storage; frozen groups are usually bfloat16

    def __post_init__(self) -> None:
        choice("groups.dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up, a schedule and clipping by global norm (LLaVA-1.5's recipe, `HF Trainer` defaults)."""

    lr: float = 2e-5
    schedule: str = "cosine"
    warmup_fraction: float = 0.03
    final_lr_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    # Of Adam's first moment: bfloat16 saves 2 bytes of the 12 that a trainable parameter takes. The second one is
    # always float32.
    first_moment_dtype: str = "float32"

    def __post_init__(self) -> None:
        choice("optimizer.schedule", self.schedule, SCHEDULES)
        choice("optimizer.first_moment_dtype", self.first_moment_dtype, ("float32", "bfloat16"))
        positive("optimizer.lr", self.lr)
        positive("optimizer.clip_norm", self.clip_norm)
        check(self.weight_decay >= 0, f"optimizer.weight_decay={self.weight_decay} must not be negative")
        for name in ("b1", "b2"):
            check(0 <= getattr(self, name) < 1, f"optimizer.{name}={getattr(self, name)} must be in [0, 1)")
        check(
            0 <= self.warmup_fraction <= 1,
            f"optimizer.warmup_fraction={self.warmup_fraction} is not a share of the steps (0..1)",
        )


VISION_PATTERN = r"vision/.*"
PROJECTOR_PATTERN = r"(layers/)?visual_proj/.*"
CROSS_PATTERN = r"cross_layers/.*"
# What stands between encoder and decoder: projectors, and Flamingo's cross layers.
CONNECTOR_PATTERN = rf"{PROJECTOR_PATTERN}|{CROSS_PATTERN}"
ADAPTER_PATTERN = r".*_lora_[ab]"

Groups = tuple[tuple[str, GroupConfig], ...]

# Frozen parts in bfloat16: stage 2's float32 parameters then start from rounded ones, as LLaVA's do.
TRAIN_PROJECTOR: Groups = (  # stage 1
    (CONNECTOR_PATTERN, GroupConfig()),
    (r".*", GroupConfig(frozen=True, dtype="bfloat16")),
)
TRAIN_ALL_BUT_VISION: Groups = (  # stage 2
    (VISION_PATTERN, GroupConfig(frozen=True, dtype="bfloat16")),
    (r".*", GroupConfig()),
)
TRAIN_ALL: Groups = ((r".*", GroupConfig()),)
TRAIN_ADAPTERS: Groups = (  # stage 2 with `lora`; LLaVA's rates are 2e-4 and 2e-5
    (ADAPTER_PATTERN, GroupConfig()),
    (CONNECTOR_PATTERN, GroupConfig(lr_scale=0.1)),
    (r".*", GroupConfig(frozen=True, dtype="bfloat16")),
)


@dataclass(frozen=True)
class StageConfig:
    """One of the two stages of training."""

    sources: tuple[SourceConfig, ...] = ()
    validation: tuple[SourceConfig, ...] = ()  # held out: a loss and a few answers while training; (): neither
    template: str = "vicuna_v1"
    sharing: str = "per_layer"  # of the projectors during this stage
    batch_size: int = 128  # rows of a step, over all devices; packed rows hold several samples each
    accumulation: int = 1  # micro-batches that a step reads its rows in, one after the other; saves activations
    text_length: int = 1024  # T: text tokens of a row
    max_images: int = 1  # M: image slots of a row
    steps: int | None = None  # None: epochs decide
    epochs: float = 1.0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    # What trains: the first row whose regex matches the whole path of a parameter gives its group; a parameter that
    # no row matches is an error.
    groups: Groups = TRAIN_ALL_BUT_VISION
    lora: LoraConfig = field(default_factory=LoraConfig)  # with groups=TRAIN_ADAPTERS

    def __post_init__(self) -> None:
        choice("sharing", self.sharing, SHARINGS)
        positive("batch_size", self.batch_size)
        positive("accumulation", self.accumulation)
        check(
            self.batch_size % self.accumulation == 0,
            f"batch_size={self.batch_size} does not divide by accumulation={self.accumulation}",
        )
        positive("text_length", self.text_length)
        check(self.max_images >= 0, f"max_images={self.max_images} must not be negative")
        for kind in ("sources", "validation"):
            weights = [source.weight for source in getattr(self, kind)]
            check(not weights or sum(weights) > 0, f"{kind}: weights {weights} sum to nothing")
        if self.steps is not None:
            positive("steps", self.steps)
        positive("epochs", self.epochs)
        check(any(not group.frozen for _, group in self.groups), "groups: every group is frozen, nothing would train")
        for pattern, _ in self.groups:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"groups: {pattern!r} is no regular expression: {error}") from error


@dataclass(frozen=True)
class TrainingConfig:
    """Options of the training loop, the same in both stages."""

    log_every: int = 10
    eval_every: int = 500  # steps between held-out evaluations; 0: never
    eval_batches: int = 8
    eval_samples: int = 3  # generated samples shown with each held-out evaluation
    # Benchmarks, by the names of `evaluation/tasks/`, that are answered while training in stages that answer questions
    # (any template but `plain`): at the end, and every so many steps; of each the first so many questions. The last
    # three are --data, --images and --prompts of `eval.py`.
    eval_tasks: tuple[str, ...] = ()
    eval_tasks_every: int = 0  # 0: at the end of a stage only
    eval_limit: int | None = 500  # None: all
    eval_data: str = ""  # a folder that holds one for each benchmark; "": tasks that bring their own, or `validation`
    eval_images: str = ""  # what the names of pictures lead into; "": beside the questions
    eval_prompts: str = "llava"  # the school of prompts and scores: LLaVA's guide, or `lmms`
    checkpoint_every: int = 500  # steps
    checkpoint_every_minutes: float = 0.0  # and when so much time has passed since the last one; 0: by steps alone
    keep_checkpoints: int = 2
    # A directory on each host's own disk for checkpoints between those, which cost no way to a bucket: every so many
    # steps. They are read by a start with the same processes on the same hosts; None: there are none.
    local_checkpoints: str | None = None
    local_checkpoint_every: int = 50
    tensorboard: bool = True
    wandb: str | None = None  # a project of Weights & Biases that gets the same numbers
    # Positions of a row that have logits (float32, [rows, chunk, W]) at the same time; 0: all. Where the head is split
    # over fsdp, every chunk gathers it and reduces its gradient again: use as few as memory allows.
    loss_chunk: int = 512
    # A loss or gradient that is not finite: stop, or leave parameters and moments as they are, write the samples into
    # skipped.jsonl, and go on.
    on_nan: str = "stop"
    max_skips: int = 10  # more skipped steps in a row stop the run
    # Seconds without a step or an evaluation, after the first step, until the stacks of all threads are written;
    # after as long again the process ends with status 1. 0: never.
    watchdog: float = 3600.0

    def __post_init__(self) -> None:
        choice("training.on_nan", self.on_nan, ON_NAN)
        for name in (
            "log_every",
            "eval_batches",
            "checkpoint_every",
            "keep_checkpoints",
            "local_checkpoint_every",
            "max_skips",
        ):
            positive(f"training.{name}", getattr(self, name))
        if self.eval_limit is not None:
            positive("training.eval_limit", self.eval_limit)
        choice("training.eval_prompts", self.eval_prompts, SCHOOLS)
        check(
            bool(self.eval_data) or not self.eval_images,
            f"training.eval_images={self.eval_images} needs training.eval_data, whose pictures it holds",
        )
        for name in (
            "eval_every",
            "eval_samples",
            "eval_tasks_every",
            "loss_chunk",
            "watchdog",
            "checkpoint_every_minutes",
        ):
            check(getattr(self, name) >= 0, f"training.{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True)
class ProfileConfig:
    """A profiler's trace, in the stage's directory `profile`."""

    steps: tuple[int, ...] = ()  # the first and the last step that are traced, of each stage; (): none

    def __post_init__(self) -> None:
        check(
            not self.steps or (len(self.steps) == 2 and 0 < self.steps[0] <= self.steps[1]),
            f"profile.steps={self.steps} should be the first and the last step: --config.profile.steps=10,15",
        )


@dataclass(frozen=True)
class EvaluationConfig:
    tasks: tuple[str, ...] = ()  # benchmarks of `eval.py` without --tasks, by the names of `evaluation/tasks/`
    batch_size: int | None = None  # questions answered at once; None: what the devices' memory has room for
    max_new_tokens: int = 16
    limit: int | None = None  # evaluate the first so many questions only
