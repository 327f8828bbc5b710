"""What a whole checkpoint holds: the rows of all its parts, what else its files may hold, and what it cannot express.

    saisa      the official SAISA code: decoder keys of Hugging Face, `model.layers.{i}.mm_projector.{0,2}`
    llava      the original LLaVA code: the same with one `model.mm_projector.{0,2}`
    llava-hf   `LlavaForConditionalGeneration`, as transformers 4 and 5 write it
    hf         our own `SaisaForConditionalGeneration` for transformers, whose code goes with the weights (`remote/`)
    hf-llm     a decoder alone (the families of `families/`)
    hf-vision  an encoder alone (likewise)

The first two may include the vision tower or leave it in a separate directory. Everything here follows from a
`ModelConfig`; no file is opened.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from saisa_jax.config import ModelConfig, VisionConfig
from saisa_jax.convert.any_resolution import reasons_of_views
from saisa_jax.convert.families import DECODERS, ENCODERS
from saisa_jax.convert.family import EXTRAS, Aliases, DecoderFamily, EncoderFamily
from saisa_jax.convert.rows import ConvertError, TensorRow, dense

MULTIMODAL = ("saisa", "llava", "llava-hf", "hf")
LAYOUTS = (*MULTIMODAL, "hf-llm", "hf-vision")
TOWER_APART = ("saisa", "llava")  # whose tower is mostly a directory of its own
TOWER_PREFIX = {  # of the tower's keys
    "saisa": "model.vision_tower.vision_tower.",
    "llava": "model.vision_tower.vision_tower.",
    "llava-hf": "vision_tower.",
    "hf": "vision_tower.",
    "hf-vision": "",
}


@dataclass(frozen=True)
class Layout:
    """All rows of one layout for one model, and what else its files may contain."""

    name: str  # one of LAYOUTS
    rows: tuple[TensorRow, ...]
    aliases: Aliases  # other spellings of the keys above
    ignored: tuple[str, ...]  # regexes of whole keys that the model never reads
    tied: tuple[tuple[str, str], ...] = ()  # (key, other): if the file has `key`, it must equal `other`

    @property
    def parts(self) -> tuple[str, ...]:
        """Of decoder, projector, vision, those that it holds."""
        return tuple(dict.fromkeys(row.part for row in self.rows))

    def canonical(self, key: str) -> str:
        """The spelling of this layout for a key as found in a file."""
        for pattern, replacement in self.aliases:
            renamed, count = re.subn(r"\A" + pattern, replacement, key, count=1)
            if count:
                return renamed
        return key

    def ignores(self, key: str) -> bool:
        """Whether a file may hold `key` (canonical) although the model does not use it."""
        return any(re.fullmatch(pattern, key) for pattern in self.ignored)

    def part_of(self, key: str) -> str:
        """The part that a key (canonical) belongs to, one of the ignored ones too."""
        if len(self.parts) == 1:
            return self.parts[0]
        return "vision" if "vision_tower." in key else "projector" if "_projector." in key else "decoder"

    def only(self, parts: Sequence[str]) -> tuple[TensorRow, ...]:
        """The rows of the parts named."""
        return tuple(row for row in self.rows if row.part in parts)


def decoder_family(config: ModelConfig) -> DecoderFamily:
    """The family whose classes compute this decoder.

    Raises:
      ConvertError: none does.
    """
    for family in DECODERS.values():
        if family.holds(config):
            return family
    extras = " and ".join(f"model.{name}={value}" for name in EXTRAS if (value := getattr(config, name)))
    raise ConvertError(f"no family of decoders ({', '.join(DECODERS)}) has what {extras} say together")


def encoder_family(config: VisionConfig) -> EncoderFamily:
    """The family that `model.vision.family` names.

    Raises:
      ConvertError: this encoder does not belong to it.
      UnknownNameError: nothing is registered under that name.
    """
    family = ENCODERS[config.family]
    seen = {name: getattr(config, name) for name in family.switches}
    other = [f"{name}={value!r}" for name, value in seen.items() if value != family.switches[name]]
    if other:
        raise ConvertError(
            f"model.vision.family={config.family!r} is not what this encoder is: {', '.join(other)}; no file of that "
            "family can say so"
        )
    return family


def layout_for(config: ModelConfig, name: str) -> Layout:
    """The layout `name` for a model of this config.

    Raises:
      ConvertError: an unknown layout, or one that cannot hold this model.
    """
    if name not in LAYOUTS:
        raise ConvertError(f"unknown layout {name!r}; known: {', '.join(LAYOUTS)}")
    if name == "hf-vision":
        return _encoder(config.vision)
    if name == "hf-llm":
        bare = r"(?=(embed_tokens|layers|norm)\.)"  # written by the headless classes, LlamaModel and the like
        return _decoder(config, name, "model.", "", ((bare, "model."),))
    return _multimodal(config, name)


def projector_layout(config: ModelConfig) -> Layout:
    """One projector for all layers, alone in its file, as LLaVA's stage 1 leaves it."""
    shared = dataclasses.replace(config, projector=dataclasses.replace(config.projector, sharing="shared"))
    aliases = (
        (r"(base_model\.model\.)?(model\.)?mm_projector\.", "model.mm_projector."),
        (r"(model\.)?multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
        (r"(model\.)?multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    )
    return Layout("llava", tuple(_projector(shared, "llava")), aliases, ())


def _decoder(config: ModelConfig, name: str, body: str, head: str, aliases: Aliases = ()) -> Layout:
    family = decoder_family(config)
    rows = tuple(family.rows(config, body, f"{head}lm_head."))
    ignored = tuple(re.escape(body) + pattern for pattern in family.ignored())
    tied = ((f"{head}lm_head.weight", f"{body}embed_tokens.weight"),) if config.tie_embeddings else ()
    return Layout(name, rows, aliases, ignored, tied)


def _encoder(config: VisionConfig, tower: str = "") -> Layout:
    """The encoder below the prefix `tower`, which ends in a dot or is empty."""
    family = encoder_family(config)
    root = family.root(tower)
    ignored = tuple(re.escape(root) + pattern for pattern in family.ignored(config))
    ignored += () if tower else family.beside()
    return Layout("hf-vision", tuple(family.rows(config, root)), family.aliases(tower), ignored)


def _multimodal(config: ModelConfig, name: str) -> Layout:
    body, head = {
        "saisa": ("model.", ""),
        "llava": ("model.", ""),
        "llava-hf": ("language_model.model.", "language_model."),
        "hf": ("language_model.model.", "language_model."),
    }[name]
    tower = TOWER_PREFIX[name]
    decoder, vision = _decoder(config, name, body, head), _encoder(config.vision, tower)
    ignored = [*decoder.ignored, *vision.ignored]
    if name == "saisa":
        # The official class keeps LLaVA's projector, whose output layer 0 overwrites, and a projector in every layer.
        ignored.append(r"model\.mm_projector\.[02]\.(weight|bias)")
        blind = sorted(set(range(config.num_layers)) - set(config.visible_layers))
        ignored += [rf"model\.layers\.{i}\.mm_projector\.[02]\.(weight|bias)" for i in blind]
    aliases = vision.aliases
    if name == "llava-hf":
        # The class of transformers 5 (and late 4) nests everything but the head under `model.`.
        nested = tuple((r"model\." + pattern, replacement) for pattern, replacement in vision.aliases)
        aliases = (
            (r"model\.language_model\.", body),
            (r"lm_head\.", f"{head}lm_head."),
            (r"model\.multi_modal_projector\.", "multi_modal_projector."),
            *nested,
            (r"model\.vision_tower\.", tower),
            *vision.aliases,
        )
    rows = (*decoder.rows, *_projector(config, name), *vision.rows)
    return Layout(name, rows, aliases, tuple(ignored), decoder.tied)


def _projector(config: ModelConfig, name: str) -> Iterator[TensorRow]:
    if name == "hf":
        return _projectors_of_our_class(config)
    if config.per_layer_projectors != (name == "saisa"):
        raise ConvertError(
            f"layout {name!r} holds {'a projector for each layer' if name == 'saisa' else 'one projector'}, but "
            f"model.projector.sharing={config.projector.sharing!r}: use layout "
            f"{'saisa' if config.per_layer_projectors else 'llava or llava-hf'}, or the other sharing"
        )
    first, second = {
        "saisa": ("model.layers.{i}.mm_projector.0", "model.layers.{i}.mm_projector.2"),
        "llava": ("model.mm_projector.0", "model.mm_projector.2"),
        "llava-hf": ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
    }[name]
    return _projector_rows(config, first, second, config.per_layer_projectors)


def _projectors_of_our_class(config: ModelConfig) -> Iterator[TensorRow]:
    each, rank = config.per_layer_projectors, config.projector.kind == "low_rank"
    number = "{i}" if each and not rank else "shared"
    first, second = (f"multi_modal_projector.{number}.linear_{n}" for n in (1, 2))
    yield from _projector_rows(config, first, second, each and not rank)
    if each and rank:
        path, key, layers = "layers/visual_proj", "multi_modal_projector.{i}", config.visible_layers
        inner, outer = (config.projector.rank,), (config.embed_dim,)
        yield from dense(f"{path}/down", f"{key}.down", outer, inner, layers, bias=False)
        yield from dense(f"{path}/up", f"{key}.up", inner, outer, layers, bias=False)


def _projector_rows(config: ModelConfig, first: str, second: str, each: bool) -> Iterator[TensorRow]:
    """Two linear layers: one pair for all decoder layers, or one for each that sees the image."""
    path, layers = ("layers/visual_proj", config.visible_layers) if each else ("visual_proj", None)
    C, hidden, D = config.vision.embed_dim, config.projector_dim, config.embed_dim
    yield from dense(f"{path}/fc1", first, (C,), (hidden,), layers)
    yield from dense(f"{path}/fc2", second, (hidden,), (D,), layers)


# --- what a layout cannot say -----------------------------------------------------------------------------------------


def check_says(config: ModelConfig, name: str) -> None:
    """Checks that a layout can express the whole model, so that programs which read it compute the same.

    Raises:
      ConvertError: every reason why it cannot.
    """
    if name not in MULTIMODAL:
        return
    if name == "hf":
        reasons = [*_reasons_of_our_class(config)]
    else:
        reasons = [*_alignment_reasons(config, name), *_projector_reasons(config), *_encoder_reasons(config.vision)]
    reasons += reasons_of_views(config.vision, name)
    if name == "llava-hf" and not encoder_family(config.vision).in_llava_hf:
        reasons.append(
            f"model.vision.family={config.vision.family!r} is none that transformers' LLaVA can have: it wants a row "
            "of patches behind at most a class token"
        )
    if reasons:
        raise ConvertError(f"the layout {name!r} cannot say what this model is:\n  " + "\n  ".join(reasons))


_CROSSED = "model.alignment='flamingo': it has no place for cross layers; hf-llm and hf-vision hold what they join"


def _reasons_of_our_class(config: ModelConfig) -> Iterator[str]:
    if config.alignment == "flamingo":
        yield _CROSSED
    elif config.alignment == "llava":
        yield f"model.alignment={config.alignment!r}: it is saisa and naavit; LLaVA has a class of its own, llava-hf"
    if config.projector.kind not in ("mlp", "low_rank"):
        yield f"model.projector.kind={config.projector.kind!r}: its projectors are 'mlp' and 'low_rank'"
    yield from _prefix_reasons(config)
    if config.vision.num_used_layers == 0:
        yield f"model.vision.select_layer={config.vision.select_layer}: features of an encoder without any layer"


def _alignment_reasons(config: ModelConfig, name: str) -> Iterator[str]:
    wanted = "saisa" if name == "saisa" else "llava"
    if config.alignment == "flamingo":
        yield _CROSSED
    elif config.alignment != wanted:
        yield f"model.alignment={config.alignment!r}: its readers compute {wanted!r}, which is another model"
    elif config.visual_layers is not None:
        yield (
            f"model.visual_layers={list(config.visual_layers)}: its readers let every layer see the image, and make up "
            "the projectors that are missing"
        )
    yield from _prefix_reasons(config)
    for name in ("naavit_layers", "frozen_visual_layers"):
        if getattr(config, name):
            yield f"model.{name}={list(getattr(config, name))}: to its readers visual tokens are the same in all layers"


def _prefix_reasons(config: ModelConfig) -> Iterator[str]:
    if config.frozen_prefix:
        yield "model.frozen_prefix=True: its readers let text before an image attend to what is before it"


def _projector_reasons(config: ModelConfig) -> Iterator[str]:
    if config.projector.kind != "mlp":
        yield f"model.projector.kind={config.projector.kind!r}: its projectors are 'mlp' (mlp2x_gelu)"
    elif config.projector_dim != config.embed_dim:
        yield f"mlp2x_gelu projectors are {config.embed_dim} wide inside, not {config.projector_dim}"


def _encoder_reasons(vision: VisionConfig) -> Iterator[str]:
    if vision.post_norm:
        yield "model.vision.post_norm=True: its readers take the encoder's features before the last norm"
    if vision.num_registers:
        yield f"model.vision.num_registers={vision.num_registers}: to its readers they are patches"
    if vision.num_used_layers == 0:
        yield f"model.vision.select_layer={vision.select_layer}: features of an encoder without any layer"
    if vision.positions_per_side != vision.patches_per_side:
        yield (
            f"there is no place for positions that are resampled (model.vision.position_size={vision.position_size}, "
            f"image_size={vision.image_size}): use hf-llm and hf-vision"
        )
