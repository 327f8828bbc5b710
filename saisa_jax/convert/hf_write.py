"""Our configuration in Hugging Face's spelling: the reverse of `hf_config.py`."""

from __future__ import annotations

from typing import Any

from saisa_jax.config import ModelConfig, VisionConfig
from saisa_jax.convert.hf_config import ACTIVATIONS, FAMILY_OF
from saisa_jax.convert.tables import ConvertError

TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_MULTIMODAL = {
    "llava_llama": "LlavaLlamaForCausalLM",
    "llava_mistral": "LlavaMistralForCausalLM",
    "llava_qwen": "LlavaQwenForCausalLM",
}
_ENCODERS = {
    "clip_vision_model": ("CLIPVisionModel", "CLIPImageProcessor"),
    "siglip_vision_model": ("SiglipVisionModel", "SiglipImageProcessor"),
    "dinov2": ("Dinov2Model", "BitImageProcessor"),
    "convnext": ("ConvNextModel", "ConvNextImageProcessor"),
}


def decoder_family(config: ModelConfig) -> str:
    """The model_type of a decoder."""
    return "qwen2" if config.qkv_bias else "mistral" if config.sliding_window else "llama"


def encoder_family(config: VisionConfig) -> str:
    """The model_type of an encoder."""
    return next(theirs for theirs, ours in FAMILY_OF.items() if ours == config.family)


def decoder_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json of the decoder alone."""
    family = decoder_family(config)
    raw: dict[str, Any] = {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
    }
    scaling = config.rope_scaling
    if scaling.kind != "none":
        raw["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        raw["rope_scaling"] |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_length,
        }
    if family == "llama":
        raw |= {"attention_bias": False, "mlp_bias": False}
    if family == "mistral":
        raw["sliding_window"] = config.sliding_window
    if family == "qwen2":
        if config.head_dim * config.num_heads != config.embed_dim:
            raise ConvertError("Qwen2's classes have no head_dim of its own: model.head_dim x num_heads != embed_dim")
        raw["use_sliding_window"] = False
    return raw


def vision_to_hf(config: VisionConfig) -> dict[str, Any]:
    """The config.json of the encoder alone, whole: with the layers that are not used here, if the files hold them."""
    family = encoder_family(config)
    raw: dict[str, Any] = {
        "architectures": [_ENCODERS[family][0]],
        "model_type": family,
        "image_size": config.position_size or config.image_size,  # of which the table of positions is
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation),
    }
    if family == "convnext":  # its stages halve the picture after the first; its norms' epsilon is no field
        return raw | {
            "patch_size": config.patch_size // 2 ** (max(config.num_used_layers, 1) - 1),
            "num_stages": config.num_layers,
            "depths": list(config.depths),
            "hidden_sizes": list(config.widths),
            "layer_scale_init_value": 1e-6 if config.layer_scale else 0.0,
        }
    raw |= {
        "patch_size": config.patch_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "layer_norm_eps": config.norm_eps,
    }
    if family == "dinov2":
        raw["mlp_ratio"] = config.mlp_dim // config.embed_dim
        if raw["mlp_ratio"] * config.embed_dim != config.mlp_dim:
            raise ConvertError(f"DINOv2's mlp_dim is a multiple of its width, not {config.mlp_dim}")
    else:
        raw["intermediate_size"] = config.mlp_dim
    return raw


def preprocessor_to_hf(config: VisionConfig) -> dict[str, Any]:
    """The preprocessor_config.json of the encoder: how pictures become pixels."""
    size = config.image_size
    square = config.image_mode != "resize"
    raw: dict[str, Any] = {
        "image_processor_type": _ENCODERS[encoder_family(config)][1],
        "do_resize": True,
        "size": {"shortest_edge": size} if square else {"height": size, "width": size},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }
    if square:
        raw |= {"do_center_crop": True, "crop_size": {"height": size, "width": size}}
    return raw


def multimodal_to_hf(config: ModelConfig, layout: str, *, tower: str, image_token: int | None) -> dict[str, Any]:
    """The config.json of a whole model.

    Args:
      layout: saisa, llava or llava-hf.
      tower: where the original code finds the vision tower (saisa and llava).
      image_token: the id that stands for an image (llava-hf).

    Raises:
      ConvertError: a model that the layout cannot describe.
    """
    text, vision = decoder_to_hf(config), config.vision
    if layout == "llava-hf":
        if vision.kind == "convnext":
            raise ConvertError("the layout llava-hf knows no ConvNeXt: transformers' LLaVA wants a row of patches")
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
    family = {"llama": "llava_llama", "mistral": "llava_mistral", "qwen2": "llava_qwen"}[decoder_family(config)]
    return text | {
        "architectures": [_MULTIMODAL[family]],
        "model_type": family,
        "mm_vision_tower": tower,
        "mm_hidden_size": vision.embed_dim,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": vision.select_layer,
        "mm_vision_select_feature": "patch" if vision.class_token else "cls_patch",  # cls_patch: all tokens
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad" if vision.image_mode == "pad" else "square",
        "tokenizer_model_max_length": config.max_length,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
    }
