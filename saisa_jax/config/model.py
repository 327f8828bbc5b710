"""The model's part of the configuration.

Axis letters and names are those of docs/design.md: D embed_dim, N num_heads, K num_kv_heads, H head_dim,
F mlp_dim, L num_layers, W vocab_size, C vision width, P visual tokens of an image.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import numpy as np

from saisa_jax.batch import Slot
from saisa_jax.config.checks import DTYPES, ConfigError, check, choice, positive

ALIGNMENTS = ("saisa", "naavit", "llava")
SHARINGS = ("shared", "per_layer")
# What a layer keeps for the backward pass: everything, its input alone, arrays of some names, its products; the rest it
# computes again. `auto` is settled when a stage is set up: the first of LIGHTEST_FIRST that fits the devices' memory.
REMAT_POLICIES = ("none", "full", "names", "dots", "dots_no_batch")
LIGHTEST_FIRST = ("none", "dots", "names", "full")
ATTENTION_IMPLS = {"xla": None, "flash": "tpu", "cudnn": "gpu"}  # models/attention.py, and what each runs on
ROPE_SCALINGS = ("none", "linear", "llama3")
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_tanh")
IMAGE_MODES = ("pad", "square", "resize")
PROJECTIONS = (
    *(f"layers/attn/{name}_proj" for name in "qkvo"),
    *(f"layers/mlp/{n}_proj" for n in ("gate", "up", "down")),
)

VOCAB_MULTIPLE = 128  # The vocabulary is padded to this in the parameters; padded logits are -inf.


@dataclass(frozen=True)
class VisionConfig:
    """A vision encoder: a ViT (CLIP, SigLIP or DINOv2, which switch parts of it on or off) or a ConvNeXt.

    `kind` says how it computes, `family` whose weights and files these are.

    The layers of a ConvNeXt are its stages: `depths` and `widths` say how many blocks each has and how wide they are,
    `embed_dim` and `patch_size` are width and stride of the output. It has no heads, no class token and no
    `mlp_dim` of its own, and reads images of any size.
    """

    kind: str = "vit"  # a module of `models/encoders/`
    family: str = "clip"  # a module of `convert/families/`: whose tensors and config.json an export writes
    image_size: int = 336  # a remainder beyond whole patches, at the right and the bottom, is never read
    position_size: int | None = None  # of the images that the positions were learnt on: resampled; None: image_size
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
    # Which entry of the hidden states [embeddings, layer 1, ..., layer num_layers] is the output; only the layers
    # up to it exist. -2 is LLaVA's and SAISA's choice; of a ConvNeXt it is -1, the raw map of the last stage.
    select_layer: int = -2
    post_norm: bool = False  # the encoder's final LayerNorm on the selected features
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    image_mode: str = "pad"  # how an image is made square: pad | square (centre crop) | resize
    precomputed: bool = False  # a batch holds the encoder's features in place of images; set by `data.features`

    def __post_init__(self) -> None:
        where = "model.vision"
        for name in ("image_size", "patch_size", "embed_dim", "num_layers", "num_heads", "mlp_dim"):
            positive(f"{where}.{name}", getattr(self, name))
        check(
            self.image_size >= self.patch_size,
            f"{where}.image_size={self.image_size} holds no patch of {where}.patch_size={self.patch_size}",
        )
        if self.position_size is not None:
            check(
                self.kind == "vit" and self.position_size >= self.patch_size,
                f"{where}.position_size={self.position_size} needs {where}.kind=vit and at least "
                f"{where}.patch_size={self.patch_size}",
            )
        choice(f"{where}.activation", self.activation, ACTIVATIONS)
        choice(f"{where}.image_mode", self.image_mode, IMAGE_MODES)
        check(
            -(self.num_layers + 1) <= self.select_layer <= self.num_layers,
            f"{where}.select_layer={self.select_layer} is out of range: {where}.num_layers={self.num_layers} has "
            f"hidden states {-(self.num_layers + 1)}..{self.num_layers}",
        )
        check(
            len(self.image_mean) == 3 and len(self.image_std) == 3 and all(std > 0 for std in self.image_std),
            f"{where}.image_mean and {where}.image_std need one value for each of R, G, B, the latter positive",
        )
        if self.kind == "convnext":
            self._check_convnext(where)
        else:
            check(
                self.embed_dim % self.num_heads == 0,
                f"{where}.embed_dim={self.embed_dim} is not divisible by {where}.num_heads={self.num_heads}",
            )
            check(not self.depths and not self.widths, f"{where}.depths and {where}.widths need {where}.kind=convnext")

    def _check_convnext(self, where: str) -> None:
        check(
            len(self.depths) == len(self.widths) == self.num_layers,
            f"{where}.depths={self.depths} and {where}.widths={self.widths} need one entry for each of the "
            f"{where}.num_layers={self.num_layers} stages",
        )
        for size in (*self.depths, *self.widths):
            positive(f"an entry of {where}.depths and .widths,", size)
        for name in ("class_token", "pre_norm", "post_norm"):
            check(not getattr(self, name), f"{where}.kind=convnext has no {name}: set {where}.{name}=False")
        last = max(self.num_used_layers, 1) - 1
        check(
            self.embed_dim == self.widths[last],
            f"{where}.embed_dim={self.embed_dim} is not the width {self.widths[last]} of the selected stage",
        )
        check(
            self.patch_size % 2**last == 0,
            f"{where}.patch_size={self.patch_size} is no stride of the selected stage: a multiple of {2**last}",
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

    @property
    def positions_per_side(self) -> int:
        """Of the learned table, which is resampled to `patches_per_side`."""
        return (self.position_size or self.image_size) // self.patch_size


@dataclass(frozen=True)
class ProjectorConfig:
    """From the vision encoder's features [., C] into the decoder's embedding space [., D]."""

    kind: str = "mlp"  # a module of `models/projectors/`
    sharing: str = "per_layer"  # one projector for each decoder layer (SAISA's stage 2), or one for all
    hidden_dim: int | None = None  # None: embed_dim, as in LLaVA-1.5 and SAISA
    rank: int = 128  # low_rank: of each layer's part
    num_tokens: int | None = None  # P, visual tokens of an image, of a kind that chooses it (resampler)
    num_layers: int = 2  # resampler
    num_heads: int = 8  # resampler

    def __post_init__(self) -> None:
        choice("model.projector.sharing", self.sharing, SHARINGS)
        if self.hidden_dim is not None:
            positive("model.projector.hidden_dim", self.hidden_dim)
        for name in ("rank", "num_layers", "num_heads"):
            positive(f"model.projector.{name}", getattr(self, name))
        if self.num_tokens is not None:
            positive("model.projector.num_tokens", self.num_tokens)
        check(
            self.kind != "resampler" or self.num_tokens is not None,
            "model.projector.kind=resampler reads an image into a number of tokens: set model.projector.num_tokens",
        )
        check(
            self.kind not in ("mlp", "low_rank") or self.num_tokens is None,
            f"model.projector.num_tokens={self.num_tokens} is a choice of model.projector.kind=resampler: "
            f"{self.kind!r} makes one of each patch",
        )


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
        choice(f"{where}.kind", self.kind, ROPE_SCALINGS)
        check(self.factor >= 1, f"{where}.factor={self.factor} must be at least 1")
        positive(f"{where}.low_freq_factor", self.low_freq_factor)
        check(
            self.low_freq_factor < self.high_freq_factor,
            f"{where}.low_freq_factor={self.low_freq_factor} must be less than "
            f"{where}.high_freq_factor={self.high_freq_factor}",
        )
        positive(f"{where}.original_max_length", self.original_max_length)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen projections of the decoder's layers; see `models/lora.py`."""

    rank: int = 0  # 0: none
    alpha: float = 16.0  # the adapters' output is scaled by alpha / rank
    targets: str = r"layers/(attn/(q|k|v|o)_proj|mlp/.*)"  # regex of whole paths: which of PROJECTIONS have one

    def __post_init__(self) -> None:
        check(self.rank >= 0, f"lora.rank={self.rank} must not be negative")
        positive("lora.alpha", self.alpha)
        try:
            named = self.projections
        except re.error as error:
            raise ConfigError(f"lora.targets={self.targets!r} is no regular expression: {error}") from error
        check(len(named) > 0, f"lora.targets={self.targets!r} matches none of {', '.join(PROJECTIONS)}")

    @property
    def projections(self) -> tuple[str, ...]:
        return tuple(name for name in PROJECTIONS if re.fullmatch(self.targets, name))


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
    visual_layers: tuple[int, ...] | None = None  # SAISA: which layers attend to the image; None: all
    # LLaVA: layers in which visual tokens are no queries, but go through the MLP (as under NAAViT in all), and layers
    # which leave them as they are (ShortV, arXiv 2504.00502): for weights that were trained without.
    naavit_layers: tuple[int, ...] = ()
    frozen_visual_layers: tuple[int, ...] = ()
    frozen_prefix: bool = False  # text before its sample's first image gets nothing of attention (ViCA's 7B)
    end_token_ids: tuple[int, ...] = ()  # tokens that end an answer besides the template's, as an import's files say
    dtype: str = "bfloat16"  # of activations
    param_dtype: str = "float32"
    remat_policy: str = "none"  # of training; auto: the lightest that fits
    scan_layers: bool = True  # False: the same scan, unrolled
    attention_impl: str = "auto"  # of training; auto: what suits the devices. Generation always uses xla
    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)  # of the stage that trains; see `Config.trained_model`

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "max_length",
            "rope_theta", "norm_eps",
        ):  # fmt: skip
            positive(f"model.{name}", getattr(self, name))
        choice("model.alignment", self.alignment, ALIGNMENTS)
        choice("model.remat_policy", self.remat_policy, ("auto", *REMAT_POLICIES))
        choice("model.attention_impl", self.attention_impl, ("auto", *ATTENTION_IMPLS))
        choice("model.dtype", self.dtype, DTYPES)
        choice("model.param_dtype", self.param_dtype, DTYPES)
        check(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads={self.num_heads} is not divisible by model.num_kv_heads={self.num_kv_heads}",
        )
        check(self.head_dim % 2 == 0, f"model.head_dim={self.head_dim} must be even for rotary embeddings")
        check(
            all(0 <= token < self.vocab_size for token in self.end_token_ids),
            f"model.end_token_ids={self.end_token_ids} must be below model.vocab_size={self.vocab_size}",
        )
        if self.sliding_window is not None:
            positive("model.sliding_window", self.sliding_window)
        check(
            self.projector.kind != "resampler" or self.vision.embed_dim % self.projector.num_heads == 0,
            f"model.vision.embed_dim={self.vision.embed_dim} is not divisible by "
            f"model.projector.num_heads={self.projector.num_heads}",
        )
        if self.alignment != "saisa":
            check(
                self.projector.sharing == "shared",
                f"model.alignment={self.alignment!r} has one projector: set model.projector.sharing=shared and "
                "finetune.sharing=shared",
            )
            check(
                self.projector.kind != "low_rank",
                f"model.projector.kind=low_rank has a part for each layer, and model.alignment={self.alignment!r} one "
                "projector: set model.projector.kind=mlp",
            )
            check(
                self.visual_layers is None,
                f"model.visual_layers is a choice of model.alignment=saisa, not of {self.alignment!r}",
            )
        check(
            self.alignment != "llava" or not self.frozen_prefix,
            "model.frozen_prefix is a choice of model.alignment=saisa or naavit, not of 'llava'",
        )
        self._check_layers()

    def _check_layers(self) -> None:
        """Lists of layers are increasing and in range, and belong to the alignment."""
        for name in ("visual_layers", "naavit_layers", "frozen_visual_layers"):
            layers = getattr(self, name)
            if layers is None or (layers == () and name != "visual_layers"):
                continue
            bad = [i for i in layers if not 0 <= i < self.num_layers]
            check(
                not bad,
                f"model.{name} names {bad}, out of range for model.num_layers={self.num_layers} "
                f"(legal: 0..{self.num_layers - 1})",
            )
            check(
                len(layers) > 0 and list(layers) == sorted(set(layers)),
                f"model.{name}={layers} must be a non-empty, strictly increasing list of layers",
            )
            check(
                name == "visual_layers" or self.alignment == "llava",
                f"model.{name} is a choice of model.alignment=llava, not of {self.alignment!r}",
            )
        both = sorted({*self.naavit_layers} & {*self.frozen_visual_layers})
        check(not both, f"model.naavit_layers and model.frozen_visual_layers both name {both}: a layer is one of them")

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def projector_dim(self) -> int:
        return self.projector.hidden_dim or self.embed_dim

    @property
    def num_visual_tokens(self) -> int:
        """P, visual tokens of an image: as many as patches, or what the projector makes of them."""
        return self.projector.num_tokens or self.vision.num_patches

    @property
    def image_slot(self) -> Slot:
        """What an image slot of a batch holds that the model is trained on: an image, or its features."""
        vision = self.vision
        if vision.precomputed:
            return Slot((vision.num_patches, vision.embed_dim), np.dtype(self.dtype))
        return Slot.of(vision.image_size)

    @property
    def visible_layers(self) -> tuple[int, ...]:
        """The layers that attend to the image."""
        return tuple(range(self.num_layers)) if self.visual_layers is None else self.visual_layers

    @property
    def visual_roles(self) -> tuple[str, ...]:
        """What visual tokens are in each layer: `none` (not seen), `keys`, `mlp` (keys that then go through the MLP)
        or `queries` (of one stream with the text)."""
        if self.alignment == "saisa":
            seen = set(self.visible_layers)
            return tuple("keys" if layer in seen else "none" for layer in range(self.num_layers))
        roles = ["mlp" if self.alignment == "naavit" else "queries"] * self.num_layers
        for role, layers in (("mlp", self.naavit_layers), ("keys", self.frozen_visual_layers)):
            for layer in layers:
                roles[layer] = role
        return tuple(roles)

    @property
    def per_layer_projectors(self) -> bool:
        return self.projector.sharing == "per_layer"
