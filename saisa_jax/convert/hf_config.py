"""config.json in Hugging Face's spelling -> our dataclasses.

Their files leave out what equals a class default, and the defaults differ from class to class, so they stand here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saisa_jax.config import ConfigError, ModelConfig, ProjectorConfig, RopeScalingConfig, VisionConfig
from saisa_jax.convert.tables import ConvertError

_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_MISTRAL = _LLAMA | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "sliding_window": 4096,
}
_QWEN2 = _LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
# The multimodal classes of the original LLaVA code keep their decoder's fields at the top level.
DECODERS = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": _QWEN2,
    "llava": _LLAMA,
    "llava_llama": _LLAMA,
    "llava_mistral": _MISTRAL,
    "llava_qwen": _QWEN2,
}
_LINEAR = {"factor": ("factor", float)}
_LLAMA3 = _LINEAR | {
    "low_freq_factor": ("low_freq_factor", float),
    "high_freq_factor": ("high_freq_factor", float),
    "original_max_position_embeddings": ("original_max_length", int),
}
# Their rope_type -> our kind, and the fields that come with it.
ROPE_SCALINGS: dict[str, tuple[str, dict[str, tuple[str, type]]]] = {
    "default": ("none", {}),
    "linear": ("linear", _LINEAR),
    "llama3": ("llama3", _LLAMA3),
}
MAY_BE_NULL = ("sliding_window", "num_key_value_heads", "head_dim")  # where null is not the class default
_VIT: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224}
_CLIP = _VIT | {"intermediate_size": 3072, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP = _VIT | {
    "intermediate_size": 3072,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_DINOV2 = _VIT | {"mlp_ratio": 4, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
_CONVNEXT: dict[str, Any] = {
    "hidden_sizes": (96, 192, 384, 768),
    "depths": (3, 3, 9, 3),
    "patch_size": 4,
    "image_size": 224,
    "hidden_act": "gelu",
    "layer_scale_init_value": 1e-6,
}
ENCODERS = {
    "clip_vision_model": _CLIP,
    "siglip_vision_model": _SIGLIP,
    "dinov2": _DINOV2,
    "convnext": _CONVNEXT,
}
FAMILY_OF = {"clip_vision_model": "clip", "siglip_vision_model": "siglip", "dinov2": "dinov2", "convnext": "convnext"}
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# What a directory without a preprocessor_config.json is taken to want.
PIXELS = {
    "clip_vision_model": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip_vision_model": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "dinov2": IMAGENET,
    "convnext": IMAGENET,
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      ConvertError: no such file, or no JSON object in it.
    """
    if not path.is_file():
        raise ConvertError(f"{path} is not there")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ConvertError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConvertError(f"{path} holds no JSON object")
    return value


def _family(raw: Mapping[str, Any], families: Mapping[str, dict[str, Any]], default: str, source: Path) -> str:
    name = raw.get("model_type", default)
    if name not in families:
        raise ConvertError(f"{source}: model_type={name!r} is not known here; known: {', '.join(families)}")
    return name


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
    family = _family(raw, DECODERS, "llama", source)
    fields = DECODERS[family] | {k: v for k, v in raw.items() if v is not None or k in MAY_BE_NULL}
    qwen2 = family in ("qwen2", "llava_qwen")
    for field, value in (("hidden_act", "silu"), ("mlp_bias", False), ("attention_bias", False)):
        if fields.get(field, value) != value:
            raise ConvertError(f"{source}: {field}={fields[field]!r} is not supported, only {value!r}")
    if qwen2 and fields.get("use_sliding_window"):
        raise ConvertError(f"{source}: use_sliding_window=True, a window in some layers only, is not supported")
    heads = fields["num_attention_heads"]
    try:
        return ModelConfig(
            alignment=alignment,
            vocab_size=fields["vocab_size"],
            embed_dim=fields["hidden_size"],
            num_layers=fields["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=fields.get("num_key_value_heads") or heads,
            head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
            mlp_dim=fields["intermediate_size"],
            rope_theta=float(_rope(fields).get("rope_theta", fields["rope_theta"])),
            rope_scaling=_rope_scaling(_rope(fields), source),
            norm_eps=float(fields["rms_norm_eps"]),
            max_length=fields["max_position_embeddings"],
            tie_embeddings=fields["tie_word_embeddings"],
            qkv_bias=qwen2,
            sliding_window=None if qwen2 or "llama" in family else fields.get("sliding_window"),
            projector=ProjectorConfig(sharing=sharing),
            vision=vision or VisionConfig(),
        )
    except (ConfigError, TypeError) as error:
        raise ConvertError(f"{source}: {error}") from error


def _rope(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """transformers 4 writes rope_theta beside rope_scaling, transformers 5 both in one as rope_parameters."""
    return fields.get("rope_parameters") or fields.get("rope_scaling") or {}


def _rope_scaling(rope: Mapping[str, Any], source: Path) -> RopeScalingConfig:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_SCALINGS:
        known = ", ".join(ROPE_SCALINGS)
        raise ConvertError(f"{source}: rotary embeddings of type {kind!r} are not supported; known: {known}")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ConvertError(f"{source}: partial_rotary_factor={rope['partial_rotary_factor']} is not supported, only 1")
    ours, wanted = ROPE_SCALINGS[kind]
    missing = [name for name in wanted if rope.get(name) is None]
    if missing:
        raise ConvertError(f"{source}: rotary embeddings of type {kind!r} lack {', '.join(missing)}")
    return RopeScalingConfig(ours, **{field: type_(rope[name]) for name, (field, type_) in wanted.items()})


def vision_config_from_hf(
    raw: Mapping[str, Any], source: Path, select_layer: int | None = None, image_mode: str | None = None
) -> VisionConfig:
    """The encoder that a (vision) config describes.

    Args:
      raw: fields as in config.json, or in its vision_config.
      source: the directory, for messages and for its preprocessor_config.json (mean and standard deviation).
      select_layer: which hidden state is put out; None: LLaVA's choice, -1 of a ConvNeXt, -2 of all others.
      image_mode: None: pad.

    Raises:
      ConvertError: an unknown family, or an option that our encoder does not have.
    """
    raw = raw.get("vision_config", raw)
    family = _family(raw, ENCODERS, "clip_vision_model", source)
    fields = ENCODERS[family] | {k: v for k, v in raw.items() if v is not None}
    if fields["hidden_act"] not in ACTIVATIONS:
        raise ConvertError(f"{source}: hidden_act={fields['hidden_act']!r} is not one of {', '.join(ACTIVATIONS)}")
    for field, value in (("use_swiglu_ffn", False), ("qkv_bias", True), ("num_channels", 3)):
        if fields.get(field, value) != value:
            raise ConvertError(f"{source}: {field}={fields[field]!r} is not supported, only {value!r}")
    if select_layer is None:
        select_layer = -1 if family == "convnext" else -2
    if not isinstance(select_layer, int):
        raise ConvertError(f"{source}: features of several layers ({select_layer!r}) are not supported, only of one")
    preprocessor = {}
    if (source / "preprocessor_config.json").is_file():
        preprocessor = read_json(source / "preprocessor_config.json")
    mean, std = PIXELS[family]
    try:
        return VisionConfig(
            **(_convnext(fields, preprocessor, select_layer) if family == "convnext" else _vit(fields, family)),
            family=FAMILY_OF[family],
            activation=ACTIVATIONS[fields["hidden_act"]],
            select_layer=select_layer,
            image_mean=tuple(preprocessor.get("image_mean", mean)),
            image_std=tuple(preprocessor.get("image_std", std)),
            image_mode=image_mode or "pad",
        )
    except (ConfigError, TypeError) as error:
        raise ConvertError(f"{source}: {error}") from error


def _vit(fields: Mapping[str, Any], family: str) -> dict[str, Any]:
    dinov2, width = family == "dinov2", fields["hidden_size"]
    return {
        "image_size": fields["image_size"],
        "patch_size": fields["patch_size"],
        "embed_dim": width,
        "num_layers": fields["num_hidden_layers"],
        "num_heads": fields["num_attention_heads"],
        "mlp_dim": int(width * fields["mlp_ratio"]) if dinov2 else fields["intermediate_size"],
        "norm_eps": float(fields["layer_norm_eps"]),
        "class_token": family != "siglip_vision_model",
        "pre_norm": family == "clip_vision_model",
        "patch_bias": family != "clip_vision_model",
        "layer_scale": dinov2,
    }


def _convnext(fields: Mapping[str, Any], preprocessor: Mapping[str, Any], select_layer: int) -> dict[str, Any]:
    depths, widths = tuple(fields["depths"]), tuple(fields["hidden_sizes"])
    if len(depths) != len(widths):
        raise ConfigError(f"depths={depths} and hidden_sizes={widths} are not of one length")
    last = max(select_layer % (len(depths) + 1), 1) - 1  # the stage that is put out
    # The weights fit every size; published ones were trained on the preprocessor's, whatever config.json says.
    size = preprocessor.get("size", fields["image_size"])
    if isinstance(size, Mapping):
        size = size.get("shortest_edge", size.get("height"))
    return {
        "kind": "convnext",
        "image_size": size,
        "patch_size": fields["patch_size"] * 2**last,
        "embed_dim": widths[last],
        "num_layers": len(depths),
        "depths": depths,
        "widths": widths,
        "norm_eps": 1e-6,  # of all norms but the one before the classifier, which is the one that layer_norm_eps sets
        "class_token": False,
        "pre_norm": False,
        "patch_bias": True,
        "layer_scale": fields["layer_scale_init_value"] > 0,
    }
