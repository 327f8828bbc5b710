"""config.json and preprocessor_config.json <-> our dataclasses.

How a family spells its own fields is in `families/`; here is which of them a checkpoint is made of, and what the
multimodal layouts add.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saisa_jax.config import ConfigError, ModelConfig, ProjectorConfig, VisionConfig
from saisa_jax.convert.any_resolution import FEATURE_GRIDS, MERGED, refusal, views_to_llava, with_grids
from saisa_jax.convert.families import DECODERS, ENCODERS
from saisa_jax.convert.family import DecoderFamily
from saisa_jax.convert.files.open import open_checkpoint
from saisa_jax.convert.hf_json import CONFIG, read_json, read_preprocessor
from saisa_jax.convert.layouts import decoder_family, encoder_family
from saisa_jax.convert.match import layout_of
from saisa_jax.convert.rows import ConvertError

MAY_BE_NULL = ("sliding_window", "num_key_value_heads", "head_dim")  # where null is not the class default
# What LlavaConfig takes where its files say nothing of the tower.
LLAVA_HF_TOWER = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336,
    "patch_size": 14, "num_hidden_layers": 24, "num_attention_heads": 16,
}  # fmt: skip
# Switches of the original LLaVA that are not supported, and what they do.
LLAVA_OPTIONS = {
    "mm_use_im_start_end": "its prompts hold an image between the tokens <im_start> and <im_end>",
    "mm_use_im_patch_token": "its vocabulary has a token <im_patch>",
    "s2": "it reads an image at several sizes (S2)",
}
# In the config.json of an encoder that is exported alone: which features of it, and of which pictures, are meant.
FEATURE_LAYER, FEATURE_NORM = "vision_feature_layer", "vision_feature_norm"
FEATURE_IMAGE_MODE = "vision_image_mode"
# Of which there is a nearer one here.
INSTEAD = {
    "siglip2_vision_model": "it reads pictures of any shape (NaFlex); take a SigLIP2 of one resolution, such as "
    "google/siglip2-so400m-patch14-384",
    "gemma3_text": "it has other norms, and layers of two kinds; docs/weights.md says why it is left out",
}
TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


# --- theirs -> ours ---------------------------------------------------------------------------------------------------


def decoder_config_from_hf(
    raw: Mapping[str, Any],
    source: Path,
    *,
    alignment: str = "saisa",
    sharing: str = "per_layer",
    vision: VisionConfig | None = None,
) -> ModelConfig:
    """The decoder that a (text) config describes, with the alignment, projectors and tower given.

    Args:
      raw: fields as in config.json.
      source: the directory that `raw` is from, for messages.

    Raises:
      ConvertError: an unknown family, or an option that our decoder does not have.
    """
    named: dict[str, DecoderFamily] = {family.model_type: family for family in DECODERS.values()}
    named |= {name: family for family in DECODERS.values() for name in (family.llava[0], *family.also)}
    family = named.get(raw.get("model_type") or "llama")
    if family is None:
        raise _unknown(raw, source, named)
    fields = {**family.defaults, **{k: v for k, v in raw.items() if v is not None or k in MAY_BE_NULL}}
    try:
        family.check_fields(fields)
        return ModelConfig(
            **family.config_from_hf(fields),
            alignment=alignment,
            projector=ProjectorConfig(sharing=sharing),
            vision=vision or VisionConfig(),
        )
    except (ConfigError, TypeError) as error:
        raise ConvertError(f"{source}: {error}") from error


def vision_config_from_hf(
    raw: Mapping[str, Any], source: Path, select_layer: int | None = None, image_mode: str | None = None
) -> VisionConfig:
    """The encoder that a (vision) config describes.

    Args:
      raw: fields as in config.json, or in its vision_config.
      source: the directory, for messages and for its preprocessor_config.json (mean and standard deviation).
      select_layer: which hidden state is put out; None: the one that an export of ours names, or the family's, mostly
        LLaVA's choice, -2.
      image_mode: None: the one that an export of ours names, or pad.

    Raises:
      ConvertError: an unknown family, or an option that our encoder does not have.
    """
    raw = raw.get("vision_config") or raw
    named = {family.model_type: (name, family) for name, family in ENCODERS.items()}
    model_type = raw.get("model_type") or "clip_vision_model"
    if model_type not in named:
        raise _unknown(raw, source, named)
    name, family = named[model_type]
    fields = {**family.defaults, **{k: v for k, v in raw.items() if v is not None}}
    declared = raw.get(FEATURE_LAYER)
    if select_layer is None:
        select_layer = family.select_layer if declared is None else declared
    if not isinstance(select_layer, int):
        raise ConvertError(f"{source}: features of several layers ({select_layer!r}) are not supported, only of one")
    preprocessor, grids = read_preprocessor(source), raw.get(FEATURE_GRIDS)
    try:
        family.check_fields(fields)
        return VisionConfig(
            family=name,
            **{**family.switches, **family.config_from_hf(fields, preprocessor, select_layer)},
            select_layer=select_layer,
            post_norm=bool(raw.get(FEATURE_NORM)) and select_layer == declared,
            image_mean=tuple(preprocessor.get("image_mean") or family.image_mean),
            image_std=tuple(preprocessor.get("image_std") or family.image_std),
            image_mode=image_mode or raw.get(FEATURE_IMAGE_MODE) or "pad",
            image_grids=None if grids is None or image_mode else tuple((height, width) for height, width in grids),
        )
    except (ConfigError, TypeError) as error:
        raise ConvertError(f"{source}: {error}") from error


def image_mode_from_hf(preprocessor: Mapping[str, Any]) -> str | None:
    """How an image is made square (`model.vision.image_mode`); None: it does not say."""
    if preprocessor.get("do_pad"):
        return "pad"
    if preprocessor.get("do_center_crop", str(preprocessor.get("image_processor_type")).startswith("CLIP")):
        return "square"
    size = preprocessor.get("size")
    return "resize" if isinstance(size, Mapping) and {"height", "width"} <= set(size) else None


def _unknown(raw: Mapping[str, Any], source: Path, known: Mapping[str, Any]) -> ConvertError:
    name = raw.get("model_type")
    instead = f": {INSTEAD[name]}" if name in INSTEAD else f"; known: {', '.join(known)}"
    return ConvertError(f"{source}: model_type={name!r} is not known here{instead}")


def config_from_hf(
    directory: str | Path,
    *,
    layout: str | None = None,
    vision: str | Path | None = None,
    select_layer: int | None = None,
    raw: dict[str, Any] | None = None,
) -> ModelConfig:
    """The ModelConfig that a directory's config.json describes.

    Args:
      directory: a checkpoint in one of the layouts of `layouts.py`.
      layout: one of `layouts.LAYOUTS`; None: told from the tensors' names.
      vision: the directory of the vision tower, where the checkpoint does not describe its own (the layouts saisa and
        llava; None: the folder that `mm_vision_tower` names, if it is inside the directory).
      select_layer: which hidden state of the tower is used, where the checkpoint does not say (hf-vision); None:
        the family's, mostly LLaVA's choice, -2.
      raw: the content of config.json; None: it is read.

    Raises:
      ConvertError: a config that is missing, contradictory, or of a family or option not supported.
    """
    directory = Path(directory)
    layout = layout or layout_of(open_checkpoint(directory))
    raw = raw or read_json(directory / CONFIG)
    if layout == "hf-vision":
        raw_vision = raw.get("vision_config") or raw
        return dataclasses.replace(ModelConfig(), vision=vision_config_from_hf(raw_vision, directory, select_layer))
    if layout == "llava-hf":
        return _llava_hf(raw, directory)
    if layout == "hf":
        return _saisa_hf(raw, directory)
    if layout == "hf-llm":
        text = raw.get("text_config") or raw
        if vision is None:
            return decoder_config_from_hf(text, directory)
        tower = vision_config_from_hf(read_json(Path(vision) / CONFIG), Path(vision), select_layer)
        return decoder_config_from_hf(text, directory, vision=tower)
    return _original(raw, directory, layout, vision, select_layer)


def _llava_hf(raw: Mapping[str, Any], directory: Path) -> ModelConfig:
    model_type = raw.get("model_type", "llava")
    if model_type != "llava":
        why = f"{MERGED}; " if model_type == "llava_next" else ""
        raise _unsupported(
            directory, "model_type", model_type, f"{why}take a checkpoint of LLaVA-1.5 (model_type llava)"
        )
    _check_llava(raw, directory, "llava-hf")
    text, vision = dict(raw.get("text_config") or {}), raw.get("vision_config") or LLAVA_HF_TOWER
    mode = image_mode_from_hf(read_preprocessor(directory))
    tower = vision_config_from_hf(vision, directory, raw.get("vision_feature_layer", -2), mode)
    _check_tower(tower, directory)
    _expect(raw, "vision_feature_select_strategy", "default" if tower.class_token else "full", directory)
    _expect(raw, "projector_hidden_act", "gelu", directory)
    _expect(raw, "multimodal_projector_bias", True, directory)
    text["tie_word_embeddings"] = bool(text.get("tie_word_embeddings") or raw.get("tie_word_embeddings"))
    return decoder_config_from_hf(text, directory, alignment="llava", sharing="shared", vision=tower)


def _saisa_hf(raw: Mapping[str, Any], directory: Path) -> ModelConfig:
    if raw.get("model_type") != "saisa":
        raise _unsupported(directory, "model_type", raw.get("model_type"), "this layout is an export of `saisa`")
    select, mode = raw["vision_feature_layer"], image_mode_from_hf(read_preprocessor(directory))
    vision = dict(raw["vision_config"]) | {FEATURE_LAYER: select, FEATURE_NORM: raw["vision_feature_norm"]}
    tower = with_image_size(vision_config_from_hf(vision, directory, image_mode=mode), raw["image_size"])
    model = decoder_config_from_hf(
        raw["text_config"],
        directory,
        alignment=raw["alignment"],
        sharing=raw["projector_sharing"],
        vision=tower,
    )
    kind = {"kind": raw["projector_kind"], "rank": raw["projector_rank"], "hidden_dim": raw["projector_dim"]}
    projector = dataclasses.replace(model.projector, **kind)
    layers = raw["visual_layers"]
    return dataclasses.replace(model, projector=projector, visual_layers=None if layers is None else tuple(layers))


def with_image_size(vision: VisionConfig, image_size: int) -> VisionConfig:
    """An encoder for images of another size than it was trained on, whose positions are resampled.

    Raises:
      ConfigError: no patch of it fits.
    """
    learnt = None if vision.kind == "convnext" or image_size == vision.image_size else vision.image_size
    return dataclasses.replace(vision, image_size=image_size, position_size=learnt)


def _original(
    raw: Mapping[str, Any], directory: Path, layout: str, vision: str | Path | None, select_layer: int | None
) -> ModelConfig:
    """The layouts saisa and llava."""
    _check_llava(raw, directory, layout)
    _expect(raw, "mm_projector_type", "mlp2x_gelu", directory)
    folder = vision_directory(directory, vision)
    mode = "pad"
    if raw.get("image_aspect_ratio") != "pad":  # then as the tower's own processor does; CLIP's is a centre crop
        mode = image_mode_from_hf(read_preprocessor(folder) | {"do_pad": False}) or "square"
    said = raw.get("mm_vision_select_layer")
    select = select_layer if said is None else said
    tower = vision_config_from_hf(read_json(folder / CONFIG), folder, select, image_mode=mode)
    _check_tower(tower, directory)
    tower = with_grids(tower, raw, directory / CONFIG)
    if raw.get("mm_vision_select_feature") != "cls_patch" or tower.class_token:  # cls_patch: all tokens
        _expect(raw, "mm_vision_select_feature", "patch", directory)
    width = raw.get("mm_hidden_size") or tower.embed_dim
    if width != tower.embed_dim:
        raise ConvertError(f"{directory}: mm_hidden_size={width}, but the tower in {folder} is {tower.embed_dim} wide")
    alignment, sharing = ("saisa", "per_layer") if layout == "saisa" else ("llava", "shared")
    return decoder_config_from_hf(raw, directory, alignment=alignment, sharing=sharing, vision=tower)


def _check_llava(raw: Mapping[str, Any], directory: Path, layout: str) -> None:
    """Raises ConvertError for what LLaVA's successors and options compute and this program does not, by name."""
    for field, done in LLAVA_OPTIONS.items():
        if raw.get(field):
            raise _unsupported(directory, field, raw[field], f"{done}; take a checkpoint that was trained without")
    if refused := refusal(raw, layout):
        raise _unsupported(directory, *refused)


def _check_tower(tower: VisionConfig, directory: Path) -> None:
    if tower.num_registers:
        raise ConvertError(
            f"{directory}: its tower has {tower.num_registers} registers (model_type dinov2_with_registers), which "
            "LLaVA's programs take for patches: this is not supported; take a checkpoint with another tower"
        )


def _unsupported(directory: Path, field: str, value: Any, instead: str) -> ConvertError:
    return ConvertError(f"{directory / CONFIG}: {field}={value!r} is not supported: {instead}")


def _expect(raw: Mapping[str, Any], field: str, value: Any, directory: Path) -> None:
    if raw.get(field) not in (None, value):
        raise ConvertError(f"{directory / CONFIG}: {field}={raw[field]!r} is not supported, only {value!r}")


def vision_directory(directory: str | Path, vision: str | Path | None = None) -> Path:
    """Where the tower of an original LLaVA or SAISA checkpoint lies: `vision`, or a folder inside `directory`."""
    if vision is not None:
        return Path(vision)
    directory = Path(directory)
    name = read_json(directory / CONFIG).get("mm_vision_tower", "")
    # An export names the folder inside it absolutely, and may have been moved since.
    for folder in (directory / name, directory / Path(name).name):
        if name and folder.is_dir() and directory.resolve() in folder.resolve().parents:
            return folder
    tower = name or "DIR"
    raise ConvertError(f"{directory} does not hold its vision tower, which is {name!r}: name it, --vision={tower}")


# --- ours -> theirs ---------------------------------------------------------------------------------------------------


def decoder_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json of the decoder alone.

    Raises:
      ConvertError: a decoder that no family's config.json describes.
    """
    family = decoder_family(config)
    try:
        fields = family.config_to_hf(config)
    except ConfigError as error:
        raise ConvertError(str(error)) from error
    return {"architectures": [family.architecture], "model_type": family.model_type, **fields}


def vision_to_hf(config: VisionConfig) -> dict[str, Any]:
    """The config.json of the encoder alone, whole: with the layers that are not used here, if the files hold them.

    Raises:
      ConvertError: an encoder that its family's config.json does not describe.
    """
    family = encoder_family(config)
    try:
        fields = family.config_to_hf(config)
    except ConfigError as error:
        raise ConvertError(str(error)) from error
    return {"architectures": [family.architecture], "model_type": family.model_type, **fields}


def features_to_hf(config: VisionConfig) -> dict[str, Any]:
    """What an encoder's config.json says, that its import may give the same features; {}: they are the usual ones."""
    fields: dict[str, Any] = {}
    if config.post_norm or config.select_layer != encoder_family(config).select_layer:
        fields[FEATURE_LAYER] = config.select_layer
    if config.post_norm:
        fields[FEATURE_NORM] = True
    if config.image_mode != "pad":
        fields[FEATURE_IMAGE_MODE] = config.image_mode
    if config.image_grids is not None:
        fields[FEATURE_GRIDS] = [list(grid) for grid in config.image_grids]
    return fields


def preprocessor_to_hf(config: VisionConfig, *, pads: bool = False) -> dict[str, Any]:
    """The preprocessor_config.json: how pictures become pixels.

    Args:
      pads: with LLaVA's processor where we pad; else with the encoder's own, which cannot, and crops: the original
        programs of saisa and llava pad before they call it.
    """
    size = config.image_size
    square = config.image_mode != "resize"
    raw: dict[str, Any] = {
        "image_processor_type": encoder_family(config).image_processor,
        "do_resize": True,
        "size": {"shortest_edge": size} if square else {"height": size, "width": size},
        "resample": 3,  # bicubic
        "do_center_crop": square,  # said in both cases: the default of CLIP's class is to crop
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }
    if pads and config.image_mode == "pad":
        raw |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    if square:
        raw["crop_size"] = {"height": size, "width": size}
    return raw


def saisa_to_hf(config: ModelConfig, image_token: int, template: str, system_prompt: str | None) -> dict[str, Any]:
    """The config.json of the layout hf, which `remote/modeling_saisa.py` reads; fields as in its `SaisaConfig`."""
    vision = config.vision
    return {
        "architectures": ["SaisaForConditionalGeneration"],
        "model_type": "saisa",
        "auto_map": {
            "AutoConfig": "modeling_saisa.SaisaConfig",
            "AutoModelForImageTextToText": "modeling_saisa.SaisaForConditionalGeneration",
        },
        "text_config": decoder_to_hf(config),
        "vision_config": vision_to_hf(vision),
        "alignment": config.alignment,
        "projector_kind": config.projector.kind,
        "projector_rank": config.projector.rank,
        "projector_sharing": config.projector.sharing,
        "projector_dim": config.projector.hidden_dim,
        "visual_layers": None if config.visual_layers is None else list(config.visual_layers),
        "image_token_id": image_token,
        "image_seq_length": vision.num_patches,
        "image_size": vision.image_size,
        "vision_feature_layer": vision.select_layer,
        "vision_feature_norm": vision.post_norm,
        "template": template,
        "system_prompt": system_prompt,
        "tie_word_embeddings": config.tie_embeddings,
    }


def processor_to_hf(config: VisionConfig) -> dict[str, Any]:
    """The processor_config.json of the layout hf: transformers' LLaVA processor, which writes an image's P tokens."""
    return {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": config.patch_size,
        "num_additional_image_tokens": 0,
        "vision_feature_select_strategy": "full",  # P = (image_size // patch_size)^2, no class token among them
    }


def multimodal_to_hf(config: ModelConfig, layout: str, *, tower: str, image_token: int | None) -> dict[str, Any]:
    """The config.json of a whole model that `layouts.check_says` has let through.

    Args:
      layout: saisa, llava or llava-hf.
      tower: where the original code finds the vision tower (saisa and llava).
      image_token: the id that stands for an image (llava-hf).

    Raises:
      ConvertError: a model that the layout cannot describe.
    """
    text, vision = decoder_to_hf(config), config.vision
    if layout == "llava-hf":
        if image_token is None:
            raise ConvertError(
                "the layout llava-hf wants a token that stands for an image, and the tokenizer has no <image> and the "
                "vocabulary no room for one: add it before training, or use the layout llava"
            )
        return {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "text_config": text,
            "vision_config": vision_to_hf(vision),
            "image_token_index": image_token,
            "image_seq_length": vision.num_patches,
            "vision_feature_layer": vision.select_layer,
            "vision_feature_select_strategy": "default" if vision.class_token else "full",
            "projector_hidden_act": "gelu",
            "tie_word_embeddings": config.tie_embeddings,
        }
    model_type, architecture = decoder_family(config).llava
    return text | {
        "architectures": [architecture],
        "model_type": model_type,
        "mm_vision_tower": tower,
        "mm_hidden_size": vision.embed_dim,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": vision.select_layer,
        "mm_vision_select_feature": "patch" if vision.class_token else "cls_patch",  # cls_patch: all tokens
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        **views_to_llava(vision),
        "tokenizer_model_max_length": config.max_length,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
    }
