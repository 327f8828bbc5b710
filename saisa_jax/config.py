"""The configuration: frozen dataclasses, built from an `ml_collections.ConfigDict`.

The dataclasses below hold every default and every check. A recipe in `configs/` starts from
`to_config_dict(Config())` and states only what differs; `train.py` lets `--config.a.b=v` override it and hands the
result to `from_config_dict`. From there on nothing in the program reads a ConfigDict.

Axis letters and names are those of the README's legend: D embed_dim, N num_heads, K num_kv_heads, H head_dim,
F mlp_dim, L num_layers, W vocab_size, C vision width, P visual tokens of an image.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ml_collections import config_dict

ALIGNMENTS = ("saisa", "naavit", "llava")
STAGES = ("pretrain", "finetune")  # in this order
SHARINGS = ("shared", "per_layer")
REMAT_POLICIES = ("none", "full", "dots", "dots_no_batch")
ATTENTION_IMPLS = ("xla",)
ENCODERS = ("vit", "convnext")
ROPE_SCALINGS = ("none", "linear", "llama3")
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_tanh")
IMAGE_MODES = ("pad", "square", "resize")
DTYPES = ("float32", "bfloat16", "float16")
SCHEDULES = ("cosine", "linear", "constant")

VOCAB_MULTIPLE = 128  # The vocabulary is padded to this in the parameters; padded logits are -inf.


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says which flag mends it."""


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    _check(value in choices, f"{flag}={value!r} is not one of {', '.join(choices)}{hint}")


def _positive(flag: str, value: float) -> None:
    _check(value > 0, f"{flag}={value} must be positive")


@dataclass(frozen=True)
class VisionConfig:
    """A vision encoder: a ViT (CLIP, SigLIP or DINOv2, told apart by what they switch on) or a ConvNeXt.

    The layers of a ConvNeXt are its stages: `depths` and `widths` say how many blocks each has and how wide they are,
    `embed_dim` and `patch_size` are width and stride of what is put out. It has no heads, no class token and no
    `mlp_dim` of its own, and reads images of any size.
    """

    kind: str = "vit"
    image_size: int = 336  # a remainder beyond whole patches, at the right and the bottom, is never read
    patch_size: int = 14
    embed_dim: int = 1024  # C
    num_layers: int = 24
    num_heads: int = 16
    mlp_dim: int = 4096
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    class_token: bool = True
    pre_norm: bool = True  # CLIP normalises the embeddings before the first layer
    patch_bias: bool = False
    layer_scale: bool = False  # DINOv2, ConvNeXt
    depths: tuple[int, ...] = ()  # ConvNeXt: blocks of each stage
    widths: tuple[int, ...] = ()
    # Which entry of the hidden states [embeddings, layer 1, ..., layer num_layers] is put out; only the layers
    # up to it exist. -2 is LLaVA's and SAISA's choice; of a ConvNeXt it is -1, the raw map of the last stage.
    select_layer: int = -2
    post_norm: bool = False  # the encoder's final LayerNorm on the selected features
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    image_mode: str = "pad"  # how an image is made square: pad | square (centre crop) | resize

    def __post_init__(self) -> None:
        where = "model.vision"
        for name in ("image_size", "patch_size", "embed_dim", "num_layers", "num_heads", "mlp_dim"):
            _positive(f"{where}.{name}", getattr(self, name))
        _check(
            self.image_size >= self.patch_size,
            f"{where}.image_size={self.image_size} holds no patch of {where}.patch_size={self.patch_size}",
        )
        _choice(f"{where}.kind", self.kind, ENCODERS)
        _choice(f"{where}.activation", self.activation, ACTIVATIONS)
        _choice(f"{where}.image_mode", self.image_mode, IMAGE_MODES)
        _check(
            -(self.num_layers + 1) <= self.select_layer <= self.num_layers,
            f"{where}.select_layer={self.select_layer} is out of range: {where}.num_layers={self.num_layers} has "
            f"hidden states {-(self.num_layers + 1)}..{self.num_layers}",
        )
        _check(
            len(self.image_mean) == 3 and len(self.image_std) == 3 and all(std > 0 for std in self.image_std),
            f"{where}.image_mean and {where}.image_std need one value for each of R, G, B, the latter positive",
        )
        if self.kind == "convnext":
            self._check_convnext(where)
        else:
            _check(
                self.embed_dim % self.num_heads == 0,
                f"{where}.embed_dim={self.embed_dim} is not divisible by {where}.num_heads={self.num_heads}",
            )
            _check(not self.depths and not self.widths, f"{where}.depths and {where}.widths need {where}.kind=convnext")

    def _check_convnext(self, where: str) -> None:
        _check(
            len(self.depths) == len(self.widths) == self.num_layers,
            f"{where}.depths={self.depths} and {where}.widths={self.widths} need one entry for each of the "
            f"{where}.num_layers={self.num_layers} stages",
        )
        for size in (*self.depths, *self.widths):
            _positive(f"an entry of {where}.depths and .widths,", size)
        for name in ("class_token", "pre_norm", "post_norm"):
            _check(not getattr(self, name), f"{where}.kind=convnext has no {name}: set {where}.{name}=False")
        last = max(self.num_used_layers, 1) - 1
        _check(
            self.embed_dim == self.widths[last],
            f"{where}.embed_dim={self.embed_dim} is not the width {self.widths[last]} of the stage that is put out",
        )
        _check(
            self.patch_size % 2**last == 0,
            f"{where}.patch_size={self.patch_size} is no stride of the stage that is put out: a multiple of {2**last}",
        )

    @property
    def num_used_layers(self) -> int:
        """Layers up to the selected hidden state; later ones have no parameters here."""
        return self.select_layer % (self.num_layers + 1)

    @property
    def stem_size(self) -> int:
        """ConvNeXt: the side of the patches that the stem cuts; each further stage halves the sides of the map."""
        return self.patch_size // 2 ** (max(self.num_used_layers, 1) - 1)

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """P, visual tokens of an image: a square of patches, row by row."""
        return self.patches_per_side**2


@dataclass(frozen=True)
class ProjectorConfig:
    """The MLP from the vision encoder's features [., C] into the decoder's embedding space [., D]."""

    sharing: str = "per_layer"  # one projector for each decoder layer (SAISA's stage 2), or one for all
    hidden_dim: int | None = None  # None: embed_dim, as in LLaVA-1.5 and SAISA

    def __post_init__(self) -> None:
        _choice("model.projector.sharing", self.sharing, SHARINGS)
        if self.hidden_dim is not None:
            _positive("model.projector.hidden_dim", self.hidden_dim)


@dataclass(frozen=True)
class RopeScalingConfig:
    """How the rotary frequencies are stretched for a context longer than the first one trained on.

    `linear` divides every frequency by `factor`. `llama3` (Llama 3.1 and later) divides only those of which less than
    `low_freq_factor` turns fit into `original_max_length`, leaves those of more than `high_freq_factor` turns alone,
    and interpolates between; the defaults are Llama 3.1's.
    """

    kind: str = "none"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192

    def __post_init__(self) -> None:
        where = "model.rope_scaling"
        _choice(f"{where}.kind", self.kind, ROPE_SCALINGS)
        _check(self.factor >= 1, f"{where}.factor={self.factor} must be at least 1")
        _positive(f"{where}.low_freq_factor", self.low_freq_factor)
        _check(
            self.low_freq_factor < self.high_freq_factor,
            f"{where}.low_freq_factor={self.low_freq_factor} must be less than "
            f"{where}.high_freq_factor={self.high_freq_factor}",
        )
        _positive(f"{where}.original_max_length", self.original_max_length)


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder with a vision encoder and an alignment (paper section 3)."""

    alignment: str = "saisa"
    vocab_size: int = 32000  # W
    embed_dim: int = 4096  # D
    num_layers: int = 32  # L
    num_heads: int = 32  # N
    num_kv_heads: int = 32  # K
    head_dim: int = 128  # H
    mlp_dim: int = 11008  # F
    rope_theta: float = 10000.0
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    norm_eps: float = 1e-5
    max_length: int = 2048  # expanded positions of a sample, visual ones included
    tie_embeddings: bool = False
    qkv_bias: bool = False  # Qwen2
    sliding_window: int | None = None  # Mistral; None: full causal attention
    visual_layers: tuple[int, ...] | None = None  # SAISA: which layers see the image; None: all
    dtype: str = "bfloat16"  # of activations
    param_dtype: str = "float32"
    remat_policy: str = "none"
    scan_layers: bool = True  # False: the same scan, unrolled
    attention_impl: str = "xla"
    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "max_length",
            "rope_theta", "norm_eps",
        ):  # fmt: skip
            _positive(f"model.{name}", getattr(self, name))
        _choice("model.alignment", self.alignment, ALIGNMENTS)
        _choice("model.remat_policy", self.remat_policy, REMAT_POLICIES)
        _choice("model.attention_impl", self.attention_impl, ATTENTION_IMPLS)
        _choice("model.dtype", self.dtype, DTYPES)
        _choice("model.param_dtype", self.param_dtype, DTYPES)
        _check(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads={self.num_heads} is not divisible by model.num_kv_heads={self.num_kv_heads}",
        )
        _check(self.head_dim % 2 == 0, f"model.head_dim={self.head_dim} must be even for rotary embeddings")
        if self.sliding_window is not None:
            _positive("model.sliding_window", self.sliding_window)
        if self.alignment != "saisa":
            _check(
                self.projector.sharing == "shared",
                f"model.alignment={self.alignment!r} has one projector: set model.projector.sharing=shared and "
                "finetune.sharing=shared",
            )
            _check(
                self.visual_layers is None,
                f"model.visual_layers is a choice of model.alignment=saisa, not of {self.alignment!r}",
            )
        if self.visual_layers is not None:
            layers = self.visual_layers
            bad = [i for i in layers if not 0 <= i < self.num_layers]
            _check(
                not bad,
                f"model.visual_layers names {bad}, out of range for model.num_layers={self.num_layers} "
                f"(legal: 0..{self.num_layers - 1})",
            )
            _check(
                len(layers) > 0 and list(layers) == sorted(set(layers)),
                f"model.visual_layers={layers} must be a non-empty, strictly increasing list of layers",
            )

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def projector_dim(self) -> int:
        return self.projector.hidden_dim or self.embed_dim

    @property
    def visible_layers(self) -> tuple[int, ...]:
        """The layers that see the image."""
        return tuple(range(self.num_layers)) if self.visual_layers is None else self.visual_layers

    @property
    def per_layer_projectors(self) -> bool:
        return self.projector.sharing == "per_layer"


@dataclass(frozen=True)
class DataConfig:
    """What all stages and the evaluation have in common."""

    max_images: int = 1  # M: image slots of a row
    system_prompt: str | None = None  # None: the template's own
    tokenizer: str = "easy_vqa"  # a directory with a tokenizer, or "easy_vqa": the demo's, trained on its text
    # Questions of a sample whose questions are independent (all of easy_vqa's): None: all; 1: one question a sample.
    # Fewer than there are: another random choice in each epoch.
    turns_per_sample: int | None = None
    augment: bool = False  # mirror and shift images, for data whose text does not depend on left and right
    blind: bool = False  # leave every image slot empty: what can be answered without looking
    num_threads: int = 2
    prefetch: int = 16  # batches

    def __post_init__(self) -> None:
        _positive("data.max_images", self.max_images)
        if self.turns_per_sample is not None:
            _positive("data.turns_per_sample", self.turns_per_sample)


@dataclass(frozen=True)
class GroupConfig:
    """How one group of parameters trains."""

    frozen: bool = False
    lr_scale: float = 1.0
    weight_decay: float | None = None  # None: the optimizer's; norms and biases never decay
    dtype: str = "float32"  # storage; frozen groups are usually bfloat16

    def __post_init__(self) -> None:
        _choice("groups.dtype", self.dtype, DTYPES)


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

    def __post_init__(self) -> None:
        _choice("optimizer.schedule", self.schedule, SCHEDULES)
        _positive("optimizer.lr", self.lr)
        _positive("optimizer.clip_norm", self.clip_norm)
        _check(self.weight_decay >= 0, f"optimizer.weight_decay={self.weight_decay} must not be negative")
        for name in ("b1", "b2"):
            _check(0 <= getattr(self, name) < 1, f"optimizer.{name}={getattr(self, name)} must be in [0, 1)")
        _check(
            0 <= self.warmup_fraction <= 1,
            f"optimizer.warmup_fraction={self.warmup_fraction} is not a share of the steps (0..1)",
        )


VISION_PATTERN = r"vision/.*"
PROJECTOR_PATTERN = r"(layers/)?visual_proj/.*"

Groups = tuple[tuple[str, GroupConfig], ...]

# Frozen parts in bfloat16: stage 2's float32 parameters then start from rounded ones, as LLaVA's do.
TRAIN_PROJECTOR: Groups = (  # stage 1 of LLaVA and SAISA
    (PROJECTOR_PATTERN, GroupConfig()),
    (r".*", GroupConfig(frozen=True, dtype="bfloat16")),
)
TRAIN_ALL_BUT_VISION: Groups = (  # stage 2
    (VISION_PATTERN, GroupConfig(frozen=True, dtype="bfloat16")),
    (r".*", GroupConfig()),
)
TRAIN_ALL: Groups = ((r".*", GroupConfig()),)


@dataclass(frozen=True)
class StageConfig:
    """One of the two stages of training."""

    source: str = "easy_vqa"
    task: str = "vqa"  # what the source makes of its data: caption | vqa
    template: str = "vicuna_v1"
    sharing: str = "per_layer"  # of the projectors during this stage
    batch_size: int = 128  # global
    text_length: int = 1024  # T: text tokens of a row; a sample that does not fit is an error
    steps: int | None = None  # None: epochs decide
    epochs: float = 1.0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    # Who trains: the first row whose regex matches the whole path of a parameter gives its group; a parameter that
    # no row matches is an error.
    groups: Groups = TRAIN_ALL_BUT_VISION

    def __post_init__(self) -> None:
        _choice("sharing", self.sharing, SHARINGS)
        _positive("batch_size", self.batch_size)
        _positive("text_length", self.text_length)
        if self.steps is not None:
            _positive("steps", self.steps)
        _positive("epochs", self.epochs)
        _check(any(not group.frozen for _, group in self.groups), "groups: every group is frozen, nothing would train")
        for pattern, _ in self.groups:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"groups: {pattern!r} is no regular expression: {error}") from error


@dataclass(frozen=True)
class TrainingConfig:
    """The loop's habits, the same in both stages."""

    log_every: int = 10
    eval_every: int = 500  # steps between held-out evaluations; 0: never
    eval_batches: int = 8
    eval_samples: int = 3  # generated samples shown with each held-out evaluation
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in ("log_every", "eval_batches", "checkpoint_every", "keep_checkpoints"):
            _positive(f"training.{name}", getattr(self, name))
        for name in ("eval_every", "eval_samples"):
            _check(getattr(self, name) >= 0, f"training.{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; one of them may be -1 for "all the rest"."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        _check(sizes.count(-1) <= 1, f"mesh={sizes}: at most one axis may be -1")
        _check(all(size == -1 or size > 0 for size in sizes), f"mesh={sizes}: sizes are positive, or -1")


@dataclass(frozen=True)
class EvaluationConfig:
    task: str = "easy_vqa"
    batch_size: int = 64
    max_new_tokens: int = 16
    limit: int | None = None  # evaluate the first so many questions only


@dataclass(frozen=True)
class Config:
    """One run: one model, one or two stages of training, one evaluation."""

    name: str = "saisa"
    seed: int = 0
    stages: tuple[str, ...] = STAGES
    init_from: str = ""  # a finished model directory to start from; "": random weights
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pretrain: StageConfig = field(
        default_factory=lambda: StageConfig(
            task="caption",
            template="plain",
            sharing="shared",
            batch_size=256,
            optimizer=OptimizerConfig(lr=1e-3),
            groups=TRAIN_PROJECTOR,
        )
    )
    finetune: StageConfig = field(default_factory=StageConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        for stage in self.stages:
            _choice("stages", stage, STAGES)
        _check(len(self.stages) > 0, "stages is empty: name pretrain, finetune or both")
        _check(
            list(self.stages) == sorted(set(self.stages), reverse=True),
            f"stages={self.stages}: pretrain comes before finetune, each once",
        )
        _check(self.seed >= 0, f"seed={self.seed} must not be negative")
        _check(
            self.model.projector.sharing == self.finetune.sharing,
            f"model.projector.sharing={self.model.projector.sharing} is not what stage 2 trains, "
            f"finetune.sharing={self.finetune.sharing}: set both alike",
        )
        if self.model.alignment != "saisa":
            for stage in self.stages:
                _check(
                    getattr(self, stage).sharing == "shared",
                    f"model.alignment={self.model.alignment!r} has one projector: set {stage}.sharing=shared",
                )

    def stage(self, name: str) -> StageConfig:
        return getattr(self, name)

    def model_for(self, stage: str) -> ModelConfig:
        """The model as stage `stage` sees it: its own sharing of projectors."""
        projector = dataclasses.replace(self.model.projector, sharing=self.stage(stage).sharing)
        return dataclasses.replace(self.model, projector=projector)


# --- ConfigDict in and out -------------------------------------------------------------------------------------------

T = TypeVar("T")


def to_config_dict(config: Any) -> config_dict.ConfigDict:
    """A dataclass as a locked ConfigDict, nested, in which optional fields accept their type or None."""
    return config_dict.ConfigDict(_to_plain(config, placeholders=True)).lock()


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain, JSON-ready dictionaries and lists."""
    return _to_plain(config, placeholders=False)


def _to_plain(value: Any, placeholders: bool) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value))
        out: dict[str, Any] = {}
        for f in dataclasses.fields(value):
            item = _to_plain(getattr(value, f.name), placeholders)
            optional = _optional_type(hints[f.name])
            if placeholders and optional is not None and item is None:
                item = config_dict.placeholder(typing.get_origin(optional) or optional)
            elif placeholders and optional is not None and not isinstance(item, dict):
                reference = config_dict.placeholder(type(item))
                reference.set(item)
                item = reference
            out[f.name] = item
        return out
    if isinstance(value, tuple | list):
        return tuple(_to_plain(item, placeholders=False) for item in value)
    return value


def from_config_dict(cls: type[T], config: Mapping[str, Any] | config_dict.ConfigDict, path: str = "") -> T:
    """Builds dataclass `cls` from a ConfigDict or dictionary; missing keys take the dataclass's defaults.

    Raises:
      ConfigError: a key that the dataclass does not have (with the nearest ones), a value of a wrong type, or a
        combination that cannot run.
    """
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in config:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=3)
            raise ConfigError(
                f"unknown config key {path}{key}; "
                + (f"did you mean {' or '.join(path + n for n in near)}?" if near else f"known: {', '.join(names)}")
            )
    kwargs = {key: _coerce(hints[key], config[key], f"{path}{key}") for key in config}
    try:
        return cls(**kwargs)
    except ConfigError as error:
        section = path.rstrip(".")
        raise error if str(error).startswith(section) else ConfigError(f"{section}: {error}") from None


def nearest_fields(path: str) -> list[str]:
    """Fields of `Config` that a wrong dotted path may have meant: those of the same last name, else like-named ones."""
    fields: list[str] = []

    def collect(value: Any, prefix: str) -> None:
        for name, item in value.items():
            collect(item, f"{prefix}{name}.") if isinstance(item, dict) else fields.append(f"{prefix}{name}")

    collect(to_dict(Config()), "")
    same = [field for field in fields if field.split(".")[-1] == path.split(".")[-1]]
    return [] if path in fields else same or difflib.get_close_matches(path, fields, n=3)


def _coerce(hint: Any, value: Any, path: str) -> Any:
    optional = _optional_type(hint)
    if optional is not None:
        return None if value is None else _coerce(optional, value, path)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        _check(isinstance(value, Mapping | config_dict.ConfigDict), f"{path}={value!r} should be a section of fields")
        return from_config_dict(hint, value, path + ".")  # type: ignore[arg-type]
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str):  # `--config.stages=finetune`
            value = tuple(part.strip() for part in value.split(",") if part.strip())
        _check(isinstance(value, tuple | list), f"{path}={value!r} should be a tuple")
        args = typing.get_args(hint)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_coerce(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
        _check(len(value) == len(args), f"{path}={value!r} should have {len(args)} entries")
        return tuple(_coerce(arg, item, f"{path}[{i}]") for i, (arg, item) in enumerate(zip(args, value, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    _check(
        isinstance(value, hint) and not (hint is int and isinstance(value, bool)),
        f"{path}={value!r} should be of type {hint.__name__}",
    )
    return value


def _optional_type(hint: Any) -> Any:
    """X for `X | None`, else None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        args = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        if len(args) == 1 and len(typing.get_args(hint)) == 2:
            return args[0]
    return None
