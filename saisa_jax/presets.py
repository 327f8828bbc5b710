"""Known sizes: decoders and vision encoders as published, and `make`, which puts two of them together.

A preset states what the weights are (shapes, rotary base, epsilons) and what they expect (pixels, context). Everything
else keeps the defaults of `ModelConfig`, and any field can be overridden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saisa_jax.config import ConfigError, ModelConfig, ProjectorConfig, RopeScalingConfig, VisionConfig
from saisa_jax.errors import did_you_mean

# Fields of ModelConfig. `max_length` is the context that the weights were trained for.
LLMS: dict[str, dict[str, Any]] = {
    "vicuna-7b": {  # v1.5, of Llama-2
        "vocab_size": 32000,
        "embed_dim": 4096,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 32,
        "head_dim": 128,
        "mlp_dim": 11008,
        "rope_theta": 1e4,
        "norm_eps": 1e-5,
        "max_length": 4096,
    },
    "vicuna-13b": {  # v1.5, of Llama-2
        "vocab_size": 32000,
        "embed_dim": 5120,
        "num_layers": 40,
        "num_heads": 40,
        "num_kv_heads": 40,
        "head_dim": 128,
        "mlp_dim": 13824,
        "rope_theta": 1e4,
        "norm_eps": 1e-5,
        "max_length": 4096,
    },
    "llama3-8b": {  # 3, not 3.1: no scaling of the rotary frequencies
        "vocab_size": 128256,
        "embed_dim": 4096,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "mlp_dim": 14336,
        "rope_theta": 5e5,
        "norm_eps": 1e-5,
        "max_length": 8192,
    },
    "llama3.2-1b": {
        "vocab_size": 128256,
        "embed_dim": 2048,
        "num_layers": 16,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 64,
        "mlp_dim": 8192,
        "rope_theta": 5e5,
        "rope_scaling": RopeScalingConfig("llama3", factor=32.0),
        "norm_eps": 1e-5,
        "max_length": 131072,
        "tie_embeddings": True,
    },
    "mistral-7b": {  # v0.1, the one with a sliding window
        "vocab_size": 32000,
        "embed_dim": 4096,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "mlp_dim": 14336,
        "rope_theta": 1e4,
        "norm_eps": 1e-5,
        "max_length": 32768,
        "sliding_window": 4096,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "embed_dim": 576,
        "num_layers": 30,
        "num_heads": 9,
        "num_kv_heads": 3,
        "head_dim": 64,
        "mlp_dim": 1536,
        "rope_theta": 1e5,
        "norm_eps": 1e-5,
        "max_length": 8192,
        "tie_embeddings": True,
    },
    "qwen2-0.5b": {
        "vocab_size": 151936,
        "embed_dim": 896,
        "num_layers": 24,
        "num_heads": 14,
        "num_kv_heads": 2,
        "head_dim": 64,
        "mlp_dim": 4864,
        "rope_theta": 1e6,
        "norm_eps": 1e-6,
        "max_length": 32768,
        "tie_embeddings": True,
        "qkv_bias": True,
    },
}

VISIONS: dict[str, VisionConfig] = {
    "clip-vit-l-336": VisionConfig(
        family="clip",
        image_size=336,
        patch_size=14,
        embed_dim=1024,
        num_layers=24,
        num_heads=16,
        mlp_dim=4096,
        activation="quick_gelu",
        norm_eps=1e-5,
        class_token=True,
        pre_norm=True,
        patch_bias=False,
        select_layer=-2,  # LLaVA-1.5 and SAISA
        image_mean=(0.48145466, 0.4578275, 0.40821073),
        image_std=(0.26862954, 0.26130258, 0.27577711),
        image_mode="pad",
    ),
    "siglip-so400m-384": VisionConfig(
        family="siglip",
        image_size=384,  # of which 27 x 27 patches of 14 see 378
        patch_size=14,
        embed_dim=1152,
        num_layers=27,
        num_heads=16,
        mlp_dim=4304,
        activation="gelu_tanh",
        norm_eps=1e-6,
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        select_layer=-2,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        image_mode="resize",
    ),
    "dinov2-small": VisionConfig(
        family="dinov2",
        image_size=518,  # the size of its table of positions, 37 x 37
        patch_size=14,
        embed_dim=384,
        num_layers=12,
        num_heads=6,
        mlp_dim=1536,
        activation="gelu",
        norm_eps=1e-6,
        class_token=True,
        pre_norm=False,
        patch_bias=True,
        layer_scale=True,
        select_layer=-1,
        post_norm=True,  # DINOv2's patch features are those after the last norm
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
        image_mode="square",
    ),
    "convnext-xlarge-384": VisionConfig(
        kind="convnext",
        family="convnext",
        image_size=384,
        patch_size=32,
        embed_dim=2048,
        num_layers=4,
        depths=(3, 3, 27, 3),
        widths=(256, 512, 1024, 2048),
        activation="gelu",
        norm_eps=1e-6,
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        layer_scale=True,
        select_layer=-1,
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
        image_mode="pad",
    ),
}


def make(llm: str, vision: str | VisionConfig, alignment: str = "saisa", **overrides: Any) -> ModelConfig:
    """A model of known parts.

    Args:
      llm: a name in LLMS.
      vision: a name in VISIONS, or an encoder of one's own (`dataclasses.replace(VISIONS[name], image_size=224)`).
      alignment: saisa | naavit | llava. SAISA gets a projector for each layer, the others have one.
      **overrides: further fields of ModelConfig; they win over the preset's.

    Raises:
      ConfigError: an unknown name, with the nearest ones; a field that ModelConfig does not have; fields that do not
        fit together.
    """
    encoder = _find("vision preset", VISIONS, vision) if isinstance(vision, str) else vision
    fields = {
        "projector": ProjectorConfig(sharing="per_layer" if alignment == "saisa" else "shared"),
        **_find("LLM preset", LLMS, llm),
        **overrides,
    }
    known = ModelConfig.__dataclass_fields__
    for name in fields:
        if name not in known or name in ("vision", "alignment"):
            hint = did_you_mean(name, known, n=3, cutoff=0.4, otherwise=f"; known: {', '.join(known)}")
            raise ConfigError(f"make({llm!r}, ...) got {name!r}, which is no field to override{hint}")
    return ModelConfig(alignment=alignment, vision=encoder, **fields)


def _find(kind: str, table: Mapping[str, Any], name: str) -> Any:
    if name not in table:
        hint = did_you_mean(name, table, n=3, cutoff=0.4, otherwise=f"; known: {', '.join(table)}")
        raise ConfigError(f"unknown {kind} {name!r}{hint}")
    return table[name]
