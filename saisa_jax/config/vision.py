"""The vision encoder's and the projector's part of a model's configuration.

Axis letters are those of docs/design.md: C vision width, P visual tokens of an image, D the decoder's width.
"""

from __future__ import annotations

from dataclasses import dataclass

from saisa_jax.config.checks import check, choice, positive

SHARINGS = ("shared", "per_layer")
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_tanh")
SQUARE_MODES = ("pad", "square", "resize")
IMAGE_MODES = (*SQUARE_MODES, "anyres")
# LLaVA-NeXT's grids (height, width) of tiles, as many as fit into 2,880 visual tokens with the view of the whole.
NEXT_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


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
    num_registers: int = 0  # DINOv2 with registers: further learnt tokens, which are no features either
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
    # How an image is made square: pad | square (centre crop) | resize; or anyres, LLaVA-NeXT's any resolution: it is
    # resized, and also laid on a grid that is cut into tiles. Each of these views takes an image slot.
    image_mode: str = "pad"
    # anyres: (height, width) in pixels of the grids that an image may be laid on, multiples of image_size; None:
    # LLaVA-NeXT's five, two to four tiles: 1 x 2, 2 x 1, 2 x 2, 3 x 1 and 1 x 3.
    image_grids: tuple[tuple[int, int], ...] | None = None
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
        check(self.num_registers >= 0, f"{where}.num_registers={self.num_registers} must not be negative")
        choice(f"{where}.activation", self.activation, ACTIVATIONS)
        choice(f"{where}.image_mode", self.image_mode, IMAGE_MODES)
        self._check_grids(where)
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

    def _check_grids(self, where: str) -> None:
        if self.image_grids is None:
            return
        check(
            self.image_mode == "anyres",
            f"{where}.image_grids is a choice of {where}.image_mode=anyres, not of {self.image_mode!r}",
        )
        check(len(self.image_grids) > 0, f"{where}.image_grids is empty: name one, or None for LLaVA-NeXT's")
        size = self.image_size
        wrong = [grid for grid in self.image_grids if any(side < size or side % size for side in grid)]
        check(
            not wrong,
            f"{where}.image_grids={self.image_grids}: {wrong} are no (height, width) in multiples of "
            f"{where}.image_size={size}, such as {(size, 2 * size)}",
        )

    def _check_convnext(self, where: str) -> None:
        check(
            len(self.depths) == len(self.widths) == self.num_layers,
            f"{where}.depths={self.depths} and {where}.widths={self.widths} need one entry for each of the "
            f"{where}.num_layers={self.num_layers} stages",
        )
        for size in (*self.depths, *self.widths):
            positive(f"an entry of {where}.depths and .widths,", size)
        for name, none in (("class_token", False), ("num_registers", 0), ("pre_norm", False), ("post_norm", False)):
            check(getattr(self, name) == none, f"{where}.kind=convnext has no {name}: set {where}.{name}={none}")
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
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(height, width) in pixels of the grids that an image may be laid on; (): it is one square."""
        if self.image_mode != "anyres":
            return ()
        size = self.image_size
        return self.image_grids or tuple((height * size, width * size) for height, width in NEXT_GRIDS)

    @property
    def max_views(self) -> int:
        """Image slots that an image takes at most: its view as a whole, and the tiles of the largest grid."""
        return 1 + max((height * width for height, width in self.grids), default=0) // self.image_size**2

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
