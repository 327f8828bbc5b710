"""How much arithmetic a model does: by formula, and as counted in our own program.

Everything is matrix products, 2 FLOPs per multiply-add; norms, softmax, rotations and activations are left out (under
1% at 7B, 4 to 6% at the demo's size). With t text tokens, v visual tokens (M images of P), D embed, A = N*H, K*H,
F mlp, C vision width, a decoder layer costs

    part          llava           naavit          saisa
    projectors    -               -               2v(C*D + D*D)      its own; a shared one counts once for the model
    q             2(t+v)DA        2tDA            2tDA
    kv            4(t+v)D*K*H     4(t+v)D*K*H     4(t+v)D*K*H        t alone in a layer that does not see the image
    o             2(t+v)AD        2tAD            2tAD
    attention     4(t+v)(t+v)A    4t(t+v)A        4t(t+v)A           scores and values, in full: causality not halved
    mlp           6(t+v)DF        6(t+v)DF        6tDF

The last layer of llava and naavit also updates visual tokens that nobody reads any more. The paper's formula counts
that, and so do we; a compiler may drop it (jax 0.12 does in part while lowering NAAViT: 0.988 of the formula at 7B).
A ConvNeXt's depthwise convolutions, sums of k*k products a channel, are counted too.

Three conventions: "end_to_end" counts all; "decoder" leaves out the vision encoder and the head; "paper" is the
authors': the layers alone, so SAISA's projectors count (they stand in the layers) and the single one of LLaVA does not.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from flax import traverse_util
from rich.table import Table

from saisa_jax.batch import Batch, empty_batch
from saisa_jax.config import ConfigError, Groups, ModelConfig, VisionConfig
from saisa_jax.models.encoders.convnext import EXPANSION, KERNEL
from saisa_jax.models.saisa import Saisa, abstract_params
from saisa_jax.models.streams import layer_groups

PARTS = ("vision", "projectors", "q", "kv", "o", "attention", "mlp", "head")
CONVENTIONS = ("end_to_end", "decoder", "paper")


@dataclass(frozen=True)
class Breakdown:
    """FLOPs by part; print it with rich."""

    vision: float = 0.0
    projectors: float = 0.0
    q: float = 0.0
    kv: float = 0.0
    o: float = 0.0
    attention: float = 0.0
    mlp: float = 0.0
    head: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        return {part: getattr(self, part) for part in PARTS}

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def __rich__(self) -> Table:
        table = Table("part", "FLOPs", "share")
        for part, flops in [*self.parts.items(), ("total", self.total)]:
            table.add_row(part, f"{flops:.4g}", f"{flops / self.total:.1%}" if self.total else "")
        return table


class Product(NamedTuple):
    """A matrix product: what it is part of, its forward FLOPs, and what its two operands are.

    An operand is the path of a parameter, or an activation: pixels, patches (the encoder's residual stream), features
    (what it puts out), hidden (between a projector's layers), low_rank (between an adapter's two products), visual
    (the visual residual stream), visual_normed, visual_k, visual_v, text (the stream that asks), final (what the head
    reads).
    """

    part: str
    flops: float
    left: str
    right: str


# --- Inference -------------------------------------------------------------------------------------------------------


def prefill(
    config: ModelConfig, text: int, images: int = 1, head_rows: int = 1, convention: str = "end_to_end"
) -> Breakdown:
    """FLOPs of reading one row of `text` tokens and `images` images.

    Args:
      config: the model.
      text: text tokens t; the visual ones come on top.
      images: images of the row.
      head_rows: tokens that need logits: 1 to generate, `text` to train or to score.
      convention: one of CONVENTIONS.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r} is not one of {', '.join(CONVENTIONS)}")
    around = [*_vision(config, images), *_shared_projector(config, images), *_head(config, head_rows)]
    left_out = {"end_to_end": (), "decoder": ("vision", "head"), "paper": ("vision", "head", "projectors")}[convention]
    products = [product for product in around if product.part not in left_out]
    for run in layer_groups(config, images > 0):
        products += _layer(config, text, images if run.sees_image else 0) * (run.stop - run.start)
    return _sum(products)


def layer(config: ModelConfig, text: int, images: int = 1) -> Breakdown:
    """FLOPs of one decoder layer that sees the images; arguments as in `prefill`."""
    return _sum(_layer(config, text, images))


def counted_prefill(config: ModelConfig, text: int, images: int = 1) -> float:
    """FLOPs of our own prefill as XLA counts them, element-wise ones included.

    The program is lowered with abstract arrays: no weights, no compilation, a second or so at 7B. Layers are unrolled,
    because XLA counts the body of a loop once.
    """
    config = dataclasses.replace(config, scan_layers=False)

    def read(params: Any, batch: Batch) -> Any:
        return Saisa(config).apply({"params": params}, batch, 0, method=Saisa.prefill)

    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), empty_batch(1, text, images, config.vision.image_size)
    )
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # other backends do not count before they compile
        costs = jax.jit(read).lower(abstract_params(config), shapes).cost_analysis()
    if not costs or "flops" not in costs:
        raise RuntimeError(f"XLA counted no FLOPs on the CPU backend, only {costs!r}")
    return float(costs["flops"])


# --- Training --------------------------------------------------------------------------------------------------------


class Training(NamedTuple):
    """FLOPs of training steps by part, forward and backward; recomputation (remat) is in neither."""

    forward: Breakdown
    backward: Breakdown

    @property
    def total(self) -> float:
        return self.forward.total + self.backward.total


def train_step(config: ModelConfig, groups: Groups, rows: int, text: int, images: int = 1) -> float:
    """FLOPs of a forward and backward pass: the total of `training`, whose arguments it takes."""
    return training(config, groups, rows, text, images).total


def training(config: ModelConfig, groups: Groups, rows: int, text: int, images: int = 1) -> Training:
    """FLOPs of a forward and backward pass; padding counts, since it is computed; recomputation (remat) does not.

    A product costs its forward FLOPs once more for each of its two operands that needs a gradient: a parameter if it
    trains, an activation if anything before it trains. So what trains costs three times its forward pass, a frozen
    decoder behind trainable projectors twice (attention, which has two activations, three times), and a frozen encoder
    once.

    Args:
      config: the model as the stage sees it (`Config.model_for`).
      groups: who trains.
      rows: the batch size.
      text: text tokens of a row (T), padding included.
      images: image slots of a row (M), empty ones included.
    """
    trains = _who_trains(config, groups)
    needs = _activations_before_layers(config, trains)
    forward: list[Product] = []
    backward: list[Product] = []

    def add(products: Iterable[Product], times: int = 1) -> None:
        for p in products:
            flops = rows * times * p.flops
            forward.append(p._replace(flops=flops))
            backward.append(p._replace(flops=flops * (gradient(p.left) + gradient(p.right))))

    def gradient(operand: str) -> bool:
        return trains(re.escape(operand)) if "/" in operand else needs[operand]

    add([*_vision(config, images), *_shared_projector(config, images)])
    for run in layer_groups(config, images > 0):
        # A run of layers is one loop: its backward pass goes through all of it, wherever in it something trains.
        needs["text"] |= trains("layers/(?!visual_proj/).*") or (run.sees_image and needs["visual"])
        add(_layer(config, text, images if run.sees_image else 0), run.stop - run.start)
    needs["final"] = needs["text"] or trains("final_norm/.*")
    add(_head(config, text))
    return Training(_sum(forward), _sum(backward))


def _who_trains(config: ModelConfig, groups: Groups) -> Callable[[str], bool]:
    """A function that tells whether any parameter trains whose whole path matches a pattern."""
    trainable = []
    for path in traverse_util.flatten_dict(abstract_params(config), sep="/"):
        group = next((group for pattern, group in groups if re.fullmatch(pattern, path)), None)
        if group is None:
            raise ConfigError(f"parameter {path} matches no row of groups; end the list with ('.*', ...)")
        if not group.frozen:
            trainable.append(path)
    return lambda pattern: any(re.fullmatch(pattern, path) for path in trainable)


def _activations_before_layers(config: ModelConfig, trains: Callable[[str], bool]) -> dict[str, bool]:
    """Which activations have something before them that trains; the text's own is completed layer by layer."""
    projector = _projector(config)
    features = trains("vision/.*")
    hidden = features or trains(f"{projector}/fc1/.*")
    visual = hidden or trains(f"{projector}/fc2/.*")
    if config.alignment == "naavit":  # the visual stream goes through MLPs
        visual |= trains("layers/(post_attn_norm|mlp)/.*")
    normed = visual or trains("layers/input_norm/.*")
    return {
        "pixels": False,
        "patches": trains("vision/(?!post_norm/).*"),
        "features": features,
        "hidden": hidden,
        "low_rank": True,  # adapters train
        "visual": visual,
        "visual_normed": normed,
        "visual_k": normed or trains("layers/attn/k_proj/.*"),
        "visual_v": normed or trains("layers/attn/v_proj/.*"),
        "text": trains("embed_tokens/.*"),
    }


# --- What the model multiplies ---------------------------------------------------------------------------------------


def _sum(products: Iterable[Product]) -> Breakdown:
    parts: dict[str, float] = {}
    for product in products:
        parts[product.part] = parts.get(product.part, 0.0) + product.flops
    return Breakdown(**parts)


def _vision(config: ModelConfig, images: int) -> list[Product]:
    """The encoder, up to the layer that it puts out."""
    c = config.vision
    if c.kind == "convnext":
        return _convnext(c, images)
    patches = images * c.num_patches
    rows = images * (c.num_patches + c.class_token)
    square, attn = 2 * rows * c.embed_dim**2, "vision/layers/attn"
    attention = 4 * rows * (c.num_patches + c.class_token) * c.embed_dim
    mlp = 2 * rows * c.embed_dim * c.mlp_dim
    of_layer = [
        *(Product("vision", square, "patches", f"{attn}/{name}_proj/kernel") for name in "qkvo"),
        Product("vision", attention, "patches", "patches"),
        *(Product("vision", mlp, "patches", f"vision/layers/mlp/{name}/kernel") for name in ("fc1", "fc2")),
    ]
    embed = 2 * patches * 3 * c.patch_size**2 * c.embed_dim
    return [Product("vision", embed, "pixels", "vision/patch_embed/kernel"), *of_layer * c.num_used_layers]


def _convnext(c: VisionConfig, images: int) -> list[Product]:
    """Stem and stages of a ConvNeXt; its depthwise convolutions in full, taps beyond the edge of the map included."""
    places = images * (c.image_size // c.stem_size) ** 2
    embed = 2 * places * 3 * c.stem_size**2 * c.widths[0]
    products = [Product("vision", embed, "pixels", "vision/patch_embed/kernel")]
    for stage in range(c.num_used_layers):
        places = images * (c.image_size // (c.stem_size * 2**stage)) ** 2
        path, width = f"vision/stages_{stage}", c.widths[stage]
        if stage:
            halving = 2 * places * 4 * c.widths[stage - 1] * width
            products.append(Product("vision", halving, "patches", f"{path}/downsample/kernel"))
        depthwise, mlp = 2 * places * KERNEL**2 * width, 2 * places * EXPANSION * width**2
        of_block = [
            Product("vision", depthwise, "patches", f"{path}/layers/depthwise/kernel"),
            *(Product("vision", mlp, "patches", f"{path}/layers/mlp/{name}/kernel") for name in ("fc1", "fc2")),
        ]
        products += of_block * c.depths[stage]
    return products


def _projector(config: ModelConfig) -> str:
    return "layers/visual_proj" if config.per_layer_projectors else "visual_proj"


def _project(config: ModelConfig, images: int) -> list[Product]:
    """One projector, over the features of all images."""
    visual, path = images * config.vision.num_patches, _projector(config)
    fc1 = 2 * visual * config.vision.embed_dim * config.projector_dim
    fc2 = 2 * visual * config.projector_dim * config.embed_dim
    return [
        Product("projectors", fc1, "features", f"{path}/fc1/kernel"),
        Product("projectors", fc2, "hidden", f"{path}/fc2/kernel"),
    ]


def _shared_projector(config: ModelConfig, images: int) -> list[Product]:
    return [] if config.per_layer_projectors else _project(config, images)


def _layer(config: ModelConfig, text: int, images: int) -> list[Product]:
    """One decoder layer that sees `images` images."""
    c, visual = config, images * config.vision.num_patches
    asking, read = (text + visual, 0) if c.alignment == "llava" else (text, visual)
    heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    products = [
        *(_project(c, images) if c.per_layer_projectors else []),
        Product("q", 2 * asking * c.embed_dim * heads, "text", "layers/attn/q_proj/kernel"),
        *_keys_values("visual_normed", 2 * read * c.embed_dim * kv_heads),
        *_keys_values("text", 2 * asking * c.embed_dim * kv_heads),
        Product("attention", 2 * asking * read * heads, "text", "visual_k"),
        Product("attention", 2 * asking * read * heads, "text", "visual_v"),
        Product("attention", 4 * asking * asking * heads, "text", "text"),
        Product("o", 2 * asking * heads * c.embed_dim, "text", "layers/attn/o_proj/kernel"),
        *_mlp("text", 2 * asking * c.embed_dim * c.mlp_dim),
        *_mlp("visual", 2 * read * c.embed_dim * c.mlp_dim if c.alignment == "naavit" else 0),
    ]
    return [*products, *_adapters(c, products)] if c.lora.rank else products


def _adapters(config: ModelConfig, products: Iterable[Product]) -> Iterator[Product]:
    """The two thin products beside each of a layer's that has an adapter."""
    c = config
    heads, kv_heads, rank = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.lora.rank
    sizes = {  # inputs, outputs
        "q_proj": (c.embed_dim, heads),
        "k_proj": (c.embed_dim, kv_heads),
        "v_proj": (c.embed_dim, kv_heads),
        "o_proj": (heads, c.embed_dim),
        "gate_proj": (c.embed_dim, c.mlp_dim),
        "up_proj": (c.embed_dim, c.mlp_dim),
        "down_proj": (c.mlp_dim, c.embed_dim),
    }
    for part, flops, left, right in products:
        name = right.removesuffix("/kernel")
        if name in c.lora.projections:
            inputs, outputs = sizes[name.split("/")[-1]]
            yield Product(part, flops * rank / outputs, left, f"{right}_lora_a")
            yield Product(part, flops * rank / inputs, "low_rank", f"{right}_lora_b")


def _keys_values(stream: str, flops: int) -> list[Product]:
    return [Product("kv", flops, stream, f"layers/attn/{name}_proj/kernel") for name in "kv"]


def _mlp(stream: str, flops: int) -> list[Product]:
    return [Product("mlp", flops, stream, f"layers/mlp/{name}_proj/kernel") for name in ("gate", "up", "down")]


def _head(config: ModelConfig, rows: int) -> list[Product]:
    kernel = "embed_tokens/embedding" if config.tie_embeddings else "lm_head/kernel"
    return [Product("head", 2 * rows * config.embed_dim * config.padded_vocab_size, "final", kernel)]
