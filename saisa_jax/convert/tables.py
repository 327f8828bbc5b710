"""One row a parameter: where it stands here, where in somebody else's checkpoint, and how one becomes the other.

A `Row` says that our parameter `path`, stacked over `layers`, is made of the tensors `key.format(i=layer)`, each of
which is transposed by `axes`, padded with zeros where the vocabulary is, and reshaped. All of that can be undone, so
the same row serves import and export, bit for bit. Everything here follows from a `ModelConfig`; no file is opened.

Layouts:

    saisa      the official SAISA code: decoder keys of Hugging Face, `model.layers.{i}.mm_projector.{0,2}`
    llava      the original LLaVA code: the same with one `model.mm_projector.{0,2}`
    llava-hf   `LlavaForConditionalGeneration`, as transformers 4 and 5 write it
    hf-llm     a decoder alone: Llama, Mistral, Qwen2
    hf-vision  an encoder alone: CLIP, SigLIP, DINOv2, ConvNeXt (`model.vision.family`)

The first three may carry the vision tower or leave it to a directory of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from saisa_jax.config import ModelConfig, VisionConfig
from saisa_jax.errors import UserError
from saisa_jax.models.encoders.convnext import EXPANSION, KERNEL

LAYOUTS = ("saisa", "llava", "llava-hf", "hf-llm", "hf-vision")
PARTS = ("decoder", "projector", "vision")

Shape = tuple[int, ...]


class ConvertError(UserError, ValueError):
    """A checkpoint that does not fit; the message lists every tensor concerned."""


@dataclass(frozen=True)
class Row:
    """One parameter of ours and the tensors of theirs that it is made of."""

    part: str  # decoder | projector | vision
    path: str  # ours: "layers/attn/q_proj/kernel"
    key: str  # theirs, with {i} for the layer where it is stacked: "model.layers.{i}.self_attn.q_proj.weight"
    theirs: Shape  # of one tensor
    ours: Shape  # of one layer
    axes: Shape  # `theirs` transposed by these has the order of `ours`
    layers: Shape | None = None  # the layers that ours stacks, in order; None: not stacked

    @property
    def keys(self) -> tuple[str, ...]:
        """Their tensors, in the order in which ours stacks them."""
        return (self.key,) if self.layers is None else tuple(self.key.format(i=i) for i in self.layers)

    @property
    def shape(self) -> Shape:
        """Of the whole parameter, layers first."""
        return self.ours if self.layers is None else (len(self.layers), *self.ours)

    @property
    def _transposed(self) -> Shape:
        return tuple(self.theirs[axis] for axis in self.axes)

    def fill(self, out: np.ndarray, tensor: np.ndarray) -> None:
        """Writes one tensor of theirs into one layer of ours, `out`, which holds zeros."""
        array = tensor.transpose(self.axes)
        if math.prod(self.ours) == tensor.size:
            out[...] = array.reshape(self.ours)
        else:  # a padded vocabulary; such rows never split an axis
            out[tuple(slice(size) for size in array.shape)] = array

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """One tensor of theirs as one layer of ours."""
        out = np.zeros(self.ours, tensor.dtype)
        self.fill(out, tensor)
        return out

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`; entries of the padded vocabulary are cropped."""
        transposed = self._transposed
        if array.size != math.prod(transposed):
            array = array[tuple(slice(size) for size in transposed)]
        inverse = tuple(int(i) for i in np.argsort(self.axes))
        return np.ascontiguousarray(array.reshape(transposed).transpose(inverse))


@dataclass(frozen=True)
class Table:
    """All rows of one layout, and what else its files may contain."""

    layout: str
    rows: tuple[Row, ...]
    aliases: tuple[tuple[str, str], ...]  # (regex, replacement): other spellings of the keys above
    ignored: tuple[str, ...]  # regexes of whole keys that the model never reads
    tied: tuple[tuple[str, str], ...] = ()  # (key, other): if the file has `key`, it must equal `other`

    def canonical(self, key: str) -> str:
        """The spelling of this table for a key as found in a file."""
        for pattern, replacement in self.aliases:
            renamed, count = re.subn(r"\A" + pattern, replacement, key, count=1)
            if count:
                return renamed
        return key

    def ignores(self, key: str) -> bool:
        """Whether a file may hold `key` (canonical) although the model has no use for it."""
        return any(re.fullmatch(pattern, key) for pattern in self.ignored)

    def part_of(self, key: str) -> str:
        """The part that a key (canonical) belongs to, one of the ignored ones too."""
        parts = {row.part for row in self.rows}
        if len(parts) == 1:
            return parts.pop()
        return "vision" if "vision_tower." in key else "projector" if "_projector." in key else "decoder"

    def only(self, parts: Sequence[str]) -> tuple[Row, ...]:
        """The rows of the parts named."""
        return tuple(row for row in self.rows if row.part in parts)


# What the encoders of a family switch on and off: one that differs is none of them, whatever its tensors are called.
FAMILIES = {
    "clip": {"kind": "vit", "class_token": True, "pre_norm": True, "patch_bias": False, "layer_scale": False},
    "siglip": {"kind": "vit", "class_token": False, "pre_norm": False, "patch_bias": True, "layer_scale": False},
    "dinov2": {"kind": "vit", "class_token": True, "pre_norm": False, "patch_bias": True, "layer_scale": True},
    "convnext": {"kind": "convnext"},
}


def part_of_path(path: str) -> str:
    """The part that a parameter of ours belongs to: decoder, projector or vision."""
    return "vision" if path.startswith("vision/") else "projector" if "visual_proj/" in path else "decoder"


def check_says(config: ModelConfig, layout: str) -> None:
    """Checks that a layout says all there is to say of a model, so that its readers compute the same.

    Raises:
      ConvertError: every reason why it does not.
    """
    reasons = [] if layout == "hf-vision" else _decoder_reasons(config)
    if layout in ("saisa", "llava", "llava-hf"):
        reasons += _alignment_reasons(config, layout) + _projector_reasons(config) + _encoder_reasons(config.vision)
    if reasons:
        raise ConvertError(f"the layout {layout!r} cannot say what this model is:\n  " + "\n  ".join(reasons))


def _decoder_reasons(config: ModelConfig) -> list[str]:
    if config.qkv_bias and config.sliding_window:
        return ["model.qkv_bias is Qwen2's, whose classes have no model.sliding_window in every layer"]
    return []


def _alignment_reasons(config: ModelConfig, layout: str) -> list[str]:
    wanted = "saisa" if layout == "saisa" else "llava"
    if config.alignment != wanted:
        return [f"model.alignment={config.alignment!r}: its readers compute {wanted!r}, which is another model"]
    if config.visual_layers is not None:
        return [
            f"model.visual_layers={list(config.visual_layers)}: its readers let every layer see the image, and make up "
            "the projectors that are missing"
        ]
    return []


def _projector_reasons(config: ModelConfig) -> list[str]:
    if config.projector.kind != "mlp":
        return [f"model.projector.kind={config.projector.kind!r}: its projectors are 'mlp' (mlp2x_gelu)"]
    if config.projector_dim != config.embed_dim:
        return [f"mlp2x_gelu projectors are {config.embed_dim} wide inside, not {config.projector_dim}"]
    return []


def _encoder_reasons(vision: VisionConfig) -> list[str]:
    reasons = []
    if vision.post_norm:
        reasons.append("model.vision.post_norm=True: its readers take the encoder's features before the last norm")
    if vision.num_used_layers == 0:
        reasons.append(f"model.vision.select_layer={vision.select_layer}: features of an encoder without any layer")
    if vision.positions_per_side != vision.patches_per_side:
        reasons.append(
            f"there is no place for positions that are resampled (model.vision.position_size={vision.position_size}, "
            f"image_size={vision.image_size}): use hf-llm and hf-vision"
        )
    return reasons


def table(config: ModelConfig, layout: str) -> Table:
    """The rows of `layout` for a model of this config.

    Raises:
      ConvertError: an unknown layout, or one that cannot hold this model.
    """
    if layout not in LAYOUTS:
        raise ConvertError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    if layout == "hf-vision":
        return _vision_table(config.vision)
    if layout == "hf-llm":
        decoder = tuple(_decoder_rows(config, "model.", "lm_head."))
        bare = r"(?=(embed_tokens|layers|norm)\.)"  # written by the headless classes, LlamaModel and the like
        return Table(layout, decoder, ((bare, "model."),), _decoder_ignored("model."), _tied(config, "model.", ""))
    return _multimodal_table(config, layout)


def _multimodal_table(config: ModelConfig, layout: str) -> Table:
    body, head, tower = {
        "saisa": ("model.", "", "model.vision_tower.vision_tower."),
        "llava": ("model.", "", "model.vision_tower.vision_tower."),
        "llava-hf": ("language_model.model.", "language_model.", "vision_tower."),
    }[layout]
    vision = _vision_table(config.vision, tower)
    rows = (*_decoder_rows(config, body, f"{head}lm_head."), *_projector_rows(config, layout), *vision.rows)
    ignored = [*_decoder_ignored(body), *vision.ignored]
    if layout == "saisa":
        # The official class keeps LLaVA's projector, whose output layer 0 overwrites, and a projector in every layer.
        ignored.append(r"model\.mm_projector\.[02]\.(weight|bias)")
        blind = sorted(set(range(config.num_layers)) - set(config.visible_layers))
        ignored += [rf"model\.layers\.{i}\.mm_projector\.[02]\.(weight|bias)" for i in blind]
    aliases = list(vision.aliases)
    if layout == "llava-hf":
        # The class of transformers 5 (and late 4) nests everything but the head under `model.`.
        rest = tuple((r"model\." + pattern, replacement) for pattern, replacement in vision.aliases)
        aliases = [
            (r"model\.language_model\.", body),
            (r"lm_head\.", f"{head}lm_head."),
            (r"model\.multi_modal_projector\.", "multi_modal_projector."),
            *rest,
            (r"model\.vision_tower\.", tower),
            *vision.aliases,
        ]
    return Table(layout, rows, tuple(aliases), tuple(ignored), _tied(config, body, head))


# --- rows -------------------------------------------------------------------------------------------------------------


def _plain(part: str, path: str, key: str, shape: Shape, layers: Shape | None, ours: Shape | None = None) -> Row:
    """A tensor of the same order on both sides; `ours` where it is padded or loses axes of size one."""
    return Row(part, path, key, shape, shape if ours is None else ours, tuple(range(len(shape))), layers)


def _dense(
    part: str, path: str, key: str, inputs: Shape, outputs: Shape, layers: Shape | None, bias: bool
) -> Iterator[Row]:
    """torch's Linear, weight (out, in), as a DenseGeneral, kernel (*inputs, *outputs)."""
    theirs = (math.prod(outputs), math.prod(inputs))
    yield Row(part, f"{path}/kernel", f"{key}.weight", theirs, (*inputs, *outputs), (1, 0), layers)
    if bias:
        yield _plain(part, f"{path}/bias", f"{key}.bias", (math.prod(outputs),), layers, ours=outputs)


def _norm(part: str, path: str, key: str, width: int, layers: Shape | None) -> Iterator[Row]:
    """torch's LayerNorm."""
    yield _plain(part, f"{path}/scale", f"{key}.weight", (width,), layers)
    yield _plain(part, f"{path}/bias", f"{key}.bias", (width,), layers)


def _decoder_rows(config: ModelConfig, body: str, head: str) -> Iterator[Row]:
    D, F, H = config.embed_dim, config.mlp_dim, config.head_dim
    N, K, W, padded = config.num_heads, config.num_kv_heads, config.vocab_size, config.padded_vocab_size
    part, layers, bias = "decoder", tuple(range(config.num_layers)), config.qkv_bias
    attn, mlp = f"{body}layers.{{i}}.self_attn.", f"{body}layers.{{i}}.mlp."
    yield _plain(part, "embed_tokens/embedding", f"{body}embed_tokens.weight", (W, D), None, ours=(padded, D))
    yield from _dense(part, "layers/attn/q_proj", f"{attn}q_proj", (D,), (N, H), layers, bias)
    yield from _dense(part, "layers/attn/k_proj", f"{attn}k_proj", (D,), (K, H), layers, bias)
    yield from _dense(part, "layers/attn/v_proj", f"{attn}v_proj", (D,), (K, H), layers, bias)
    yield from _dense(part, "layers/attn/o_proj", f"{attn}o_proj", (N, H), (D,), layers, False)
    yield from _dense(part, "layers/mlp/gate_proj", f"{mlp}gate_proj", (D,), (F,), layers, False)
    yield from _dense(part, "layers/mlp/up_proj", f"{mlp}up_proj", (D,), (F,), layers, False)
    yield from _dense(part, "layers/mlp/down_proj", f"{mlp}down_proj", (F,), (D,), layers, False)
    for ours, theirs in (("input_norm", "input_layernorm"), ("post_attn_norm", "post_attention_layernorm")):
        yield _plain(part, f"layers/{ours}/scale", f"{body}layers.{{i}}.{theirs}.weight", (D,), layers)
    yield _plain(part, "final_norm/scale", f"{body}norm.weight", (D,), None)
    if not config.tie_embeddings:
        yield Row(part, "lm_head/kernel", f"{head}weight", (W, D), (D, padded), (1, 0))


def _projector_rows(config: ModelConfig, layout: str) -> Iterator[Row]:
    if config.per_layer_projectors != (layout == "saisa"):
        raise ConvertError(
            f"layout {layout!r} holds {'a projector for each layer' if layout == 'saisa' else 'one projector'}, but "
            f"model.projector.sharing={config.projector.sharing!r}: use layout "
            f"{'saisa' if config.per_layer_projectors else 'llava or llava-hf'}, or the other sharing"
        )
    path = "layers/visual_proj" if config.per_layer_projectors else "visual_proj"
    layers = config.visible_layers if config.per_layer_projectors else None
    first, second = {
        "saisa": ("model.layers.{i}.mm_projector.0", "model.layers.{i}.mm_projector.2"),
        "llava": ("model.mm_projector.0", "model.mm_projector.2"),
        "llava-hf": ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
    }[layout]
    C, hidden, D = config.vision.embed_dim, config.projector_dim, config.embed_dim
    yield from _dense("projector", f"{path}/fc1", first, (C,), (hidden,), layers, True)
    yield from _dense("projector", f"{path}/fc2", second, (hidden,), (D,), layers, True)


def _decoder_ignored(body: str) -> tuple[str, ...]:
    return (re.escape(body) + r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)  # a constant that old files carry


def _tied(config: ModelConfig, body: str, head: str) -> tuple[tuple[str, str], ...]:
    return ((f"{head}lm_head.weight", f"{body}embed_tokens.weight"),) if config.tie_embeddings else ()


# --- vision -----------------------------------------------------------------------------------------------------------


def _vision_table(config: VisionConfig, tower: str = "") -> Table:
    """CLIP's and SigLIP's names, DINOv2's or ConvNeXt's, below the prefix `tower` (which ends in a dot or is empty)."""
    _check_family(config)
    unused = range(config.num_used_layers, config.num_layers)
    if config.family == "convnext":
        rows = tuple(_convnext_rows(config, tower))
        root, aliases = tower, () if tower else ((r"convnext\.", ""),)
        unread = [r"layernorm\.(weight|bias)", r"classifier\.(weight|bias)"]
        unread += [rf"encoder\.stages\.{i}\..*" for i in unused]
    elif config.family == "dinov2":
        rows = tuple(_dinov2_rows(config, tower))
        root, aliases = tower, () if tower else ((r"dinov2\.", ""),)
        unread = [r"embeddings\.mask_token"] + [rf"encoder\.layer\.{i}\..*" for i in unused]
        unread += [] if config.post_norm else [r"layernorm\.(weight|bias)"]
    else:
        root = f"{tower}vision_model."
        rows = tuple(_clip_rows(config, root))
        unread = [r"embeddings\.position_ids", r"head\..*"] + [rf"encoder\.layers\.{i}\..*" for i in unused]
        unread += [] if config.post_norm else [r"post_layernorm\.(weight|bias)"]
        # transformers 5 leaves `vision_model.` out.
        bare = re.escape(tower) + r"(?=(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.)"
        aliases = ((bare, root),)
    ignored = [re.escape(root) + pattern for pattern in unread]
    if root == "vision_model.":  # the two-tower models
        ignored += [r"text_model\..*", r"logit_(scale|bias)", r"(visual|text)_projection\.weight"]
    return Table("hf-vision", rows, aliases, tuple(ignored))


def _check_family(config: VisionConfig) -> None:
    if config.family not in FAMILIES:
        raise ConvertError(f"model.vision.family={config.family!r} is not known here; known: {', '.join(FAMILIES)}")
    seen = {name: getattr(config, name) for name in FAMILIES[config.family]}
    other = [f"{name}={value!r}" for name, value in seen.items() if value != FAMILIES[config.family][name]]
    if other:
        raise ConvertError(
            f"model.vision.family={config.family!r} is not what this encoder is: {', '.join(other)}; no file of that "
            "family can say so"
        )


def _kernel(path: str, key: str, inputs: int, outputs: int, size: int, layers: Shape | None = None) -> Row:
    """torch's convolution (out, in, height, width) as ours (height, width, in, out)."""
    theirs, ours = (outputs, inputs, size, size), (size, size, inputs, outputs)
    return Row("vision", f"{path}/kernel", f"{key}.weight", theirs, ours, (2, 3, 1, 0), layers)


def _clip_rows(config: VisionConfig, root: str) -> Iterator[Row]:
    C, heads, part = config.embed_dim, config.num_heads, "vision"
    layers, places = tuple(range(config.num_used_layers)), config.positions_per_side**2 + config.class_token
    embeddings, block = f"{root}embeddings.", f"{root}encoder.layers.{{i}}."
    yield _kernel("vision/patch_embed", f"{embeddings}patch_embedding", 3, C, config.patch_size)
    if config.patch_bias:
        yield _plain(part, "vision/patch_embed/bias", f"{embeddings}patch_embedding.bias", (C,), None)
    if config.class_token:
        yield _plain(part, "vision/class_embedding", f"{embeddings}class_embedding", (C,), None)
    yield _plain(part, "vision/position_embedding", f"{embeddings}position_embedding.weight", (places, C), None)
    if config.pre_norm:
        yield from _norm(part, "vision/pre_norm", f"{root}pre_layrnorm", C, None)  # so spelt there
    split = (heads, C // heads)
    for name in ("q_proj", "k_proj", "v_proj"):
        yield from _dense(part, f"vision/layers/attn/{name}", f"{block}self_attn.{name}", (C,), split, layers, True)
    yield from _dense(part, "vision/layers/attn/o_proj", f"{block}self_attn.out_proj", split, (C,), layers, True)
    yield from _dense(part, "vision/layers/mlp/fc1", f"{block}mlp.fc1", (C,), (config.mlp_dim,), layers, True)
    yield from _dense(part, "vision/layers/mlp/fc2", f"{block}mlp.fc2", (config.mlp_dim,), (C,), layers, True)
    yield from _norm(part, "vision/layers/norm1", f"{block}layer_norm1", C, layers)
    yield from _norm(part, "vision/layers/norm2", f"{block}layer_norm2", C, layers)
    if config.post_norm:
        yield from _norm(part, "vision/post_norm", f"{root}post_layernorm", C, None)


def _dinov2_rows(config: VisionConfig, root: str) -> Iterator[Row]:
    C, heads, part = config.embed_dim, config.num_heads, "vision"
    layers, places = tuple(range(config.num_used_layers)), config.positions_per_side**2 + 1
    embeddings, block = f"{root}embeddings.", f"{root}encoder.layer.{{i}}."
    yield _kernel("vision/patch_embed", f"{embeddings}patch_embeddings.projection", 3, C, config.patch_size)
    yield _plain(part, "vision/patch_embed/bias", f"{embeddings}patch_embeddings.projection.bias", (C,), None)
    yield _plain(part, "vision/class_embedding", f"{embeddings}cls_token", (1, 1, C), None, ours=(C,))
    position = f"{embeddings}position_embeddings"
    yield _plain(part, "vision/position_embedding", position, (1, places, C), None, ours=(places, C))
    split, attention = (heads, C // heads), f"{block}attention."
    for ours, theirs in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
        path, key = f"vision/layers/attn/{ours}", f"{attention}attention.{theirs}"
        yield from _dense(part, path, key, (C,), split, layers, True)
    yield from _dense(part, "vision/layers/attn/o_proj", f"{attention}output.dense", split, (C,), layers, True)
    yield from _dense(part, "vision/layers/mlp/fc1", f"{block}mlp.fc1", (C,), (config.mlp_dim,), layers, True)
    yield from _dense(part, "vision/layers/mlp/fc2", f"{block}mlp.fc2", (config.mlp_dim,), (C,), layers, True)
    for n in (1, 2):
        yield from _norm(part, f"vision/layers/norm{n}", f"{block}norm{n}", C, layers)
        yield _plain(part, f"vision/layers/scale{n}", f"{block}layer_scale{n}.lambda1", (C,), layers)
    if config.post_norm:
        yield from _norm(part, "vision/post_norm", f"{root}layernorm", C, None)


def _convnext_rows(config: VisionConfig, root: str) -> Iterator[Row]:
    part, widths, embeddings = "vision", config.widths, f"{root}embeddings."
    yield _kernel("vision/patch_embed", f"{embeddings}patch_embeddings", 3, widths[0], config.stem_size)
    yield _plain(part, "vision/patch_embed/bias", f"{embeddings}patch_embeddings.bias", (widths[0],), None)
    yield from _norm(part, "vision/embed_norm", f"{embeddings}layernorm", widths[0], None)
    for stage in range(config.num_used_layers):
        C, ours, theirs = widths[stage], f"vision/stages_{stage}", f"{root}encoder.stages.{stage}."
        if stage:
            before, downsampling = widths[stage - 1], f"{theirs}downsampling_layer."
            yield from _norm(part, f"{ours}/norm", f"{downsampling}0", before, None)
            yield _kernel(f"{ours}/downsample", f"{downsampling}1", before, C, 2)
            yield _plain(part, f"{ours}/downsample/bias", f"{downsampling}1.bias", (C,), None)
        layers, block, ours = tuple(range(config.depths[stage])), f"{theirs}layers.{{i}}.", f"{ours}/layers"
        yield _kernel(f"{ours}/depthwise", f"{block}dwconv", 1, C, KERNEL, layers)
        yield _plain(part, f"{ours}/depthwise/bias", f"{block}dwconv.bias", (C,), layers)
        yield from _norm(part, f"{ours}/norm", f"{block}layernorm", C, layers)
        yield from _dense(part, f"{ours}/mlp/fc1", f"{block}pwconv1", (C,), (EXPANSION * C,), layers, True)
        yield from _dense(part, f"{ours}/mlp/fc2", f"{block}pwconv2", (EXPANSION * C,), (C,), layers, True)
        if config.layer_scale:
            yield _plain(part, f"{ours}/scale", f"{block}layer_scale_parameter", (C,), layers)
