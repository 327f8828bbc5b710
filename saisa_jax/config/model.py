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
from saisa_jax.config.vision import ProjectorConfig, VisionConfig

ALIGNMENTS = ("saisa", "naavit", "llava", "flamingo")
# What a layer keeps for the backward pass: everything, its input alone, arrays of some names, its products; the rest it
# computes again. `auto` is settled when a stage is set up: the first of LIGHTEST_FIRST that fits the devices' memory.
REMAT_POLICIES = ("none", "full", "names", "dots", "dots_no_batch")
LIGHTEST_FIRST = ("none", "dots", "names", "full")
ATTENTION_IMPLS = {"xla": None, "flash": "tpu", "cudnn": "gpu"}  # models/attention.py, and what each runs on
ROPE_SCALINGS = ("none", "linear", "llama3")
PROJECTIONS = (
    *(f"layers/attn/{name}_proj" for name in "qkvo"),
    *(f"layers/mlp/{n}_proj" for n in ("gate", "up", "down")),
)

VOCAB_MULTIPLE = 128  # The vocabulary is padded to this in the parameters; padded logits are -inf.


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
class FlamingoConfig:
    """Gated cross-attention between the layers of a decoder that sees no image itself; see `models/cross.py`."""

    every: int = 4  # a cross layer stands before every so many layers of the decoder, the first one included
    local_text: bool = False  # their keys are also the text since the last image (CASA); False: images alone

    def __post_init__(self) -> None:
        positive("model.flamingo.every", self.every)


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
    qk_norm: bool = False  # Qwen3: an RMSNorm over each head's queries, and one over its keys, before they are rotated
    unrotated_layers: tuple[int, ...] = ()  # SmolLM3: layers whose queries and keys are not rotated (NoPE)
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
    flamingo: FlamingoConfig = field(default_factory=FlamingoConfig)  # of alignment flamingo
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
            self.alignment in ("saisa", "naavit") or not self.frozen_prefix,
            f"model.frozen_prefix is a choice of model.alignment=saisa or naavit, not of {self.alignment!r}",
        )
        self._check_layers()
        most = self.vision.max_views * self.num_visual_tokens
        check(
            self.vision.max_views == 1 or most < self.max_length,
            f"model.vision.image_mode=anyres: an image takes up to {self.vision.max_views} x {self.num_visual_tokens} "
            f"positions, which leave no room for text in model.max_length={self.max_length}: raise it, or choose "
            "smaller model.vision.image_grids",
        )
        if self.alignment == "flamingo":
            check(
                self.flamingo.every <= self.num_layers,
                f"model.flamingo.every={self.flamingo.every} is out of range for model.num_layers={self.num_layers} "
                f"(legal: 1..{self.num_layers})",
            )
        else:
            check(
                self.flamingo == FlamingoConfig(),
                f"model.flamingo.every and .local_text are choices of model.alignment=flamingo, not of "
                f"{self.alignment!r}",
            )

    def _check_layers(self) -> None:
        """Lists of layers are increasing and in range, and belong to the alignment."""
        for name in ("visual_layers", "naavit_layers", "frozen_visual_layers", "unrotated_layers"):
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
                name in ("visual_layers", "unrotated_layers") or self.alignment == "llava",
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
    def cross_layers(self) -> tuple[int, ...]:
        """The layers of the decoder that a cross layer of Flamingo stands before."""
        return tuple(range(0, self.num_layers, self.flamingo.every)) if self.alignment == "flamingo" else ()

    @property
    def visible_layers(self) -> tuple[int, ...]:
        """The layers that attend to the image; under Flamingo, those before which a cross layer does."""
        if self.alignment == "flamingo":
            return self.cross_layers
        return tuple(range(self.num_layers)) if self.visual_layers is None else self.visual_layers

    @property
    def num_cached_layers(self) -> int:
        """Layers that have keys and values of the text: the decoder's, and cross layers that read it."""
        return self.num_layers + (len(self.cross_layers) if self.flamingo.local_text else 0)

    @property
    def rotates_images(self) -> bool:
        """Whether keys of visual tokens are rotated to their positions: not where they stand beside no text."""
        return self.alignment != "flamingo" or self.flamingo.local_text

    @property
    def visual_roles(self) -> tuple[str, ...]:
        """What visual tokens are in each layer: `none` (not seen), `keys`, `mlp` (keys that then go through the MLP)
        or `queries` (of one stream with the text). Under Flamingo cross layers alone see them."""
        if self.alignment == "saisa":
            seen = set(self.visible_layers)
            return tuple("keys" if layer in seen else "none" for layer in range(self.num_layers))
        if self.alignment == "flamingo":
            return ("none",) * self.num_layers
        roles = ["mlp" if self.alignment == "naavit" else "queries"] * self.num_layers
        for role, layers in (("mlp", self.naavit_layers), ("keys", self.frozen_visual_layers)):
            for layer in layers:
                roles[layer] = role
        return tuple(roles)

    @property
    def per_layer_projectors(self) -> bool:
        return self.projector.sharing == "per_layer"
