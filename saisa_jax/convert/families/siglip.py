"""SigLIP's and SigLIP2's vision encoders: CLIP's names, without a class token and a norm before the layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from saisa_jax.config import VisionConfig
from saisa_jax.convert.families import ENCODERS
from saisa_jax.convert.families.clip import Clip

_SWITCHES: Mapping[str, Any] = {
    "kind": "vit",
    "class_token": False,
    "num_registers": 0,
    "pre_norm": False,
    "patch_bias": True,
    "layer_scale": False,
}
_HALVES = (0.5, 0.5, 0.5)
_BASE: Mapping[str, Any] = {"embed_dim": 768, "num_layers": 12, "num_heads": 12, "mlp_dim": 3072}
_SO400M: Mapping[str, Any] = {"embed_dim": 1152, "num_layers": 27, "num_heads": 16, "mlp_dim": 4304}


def _published(image_size: int, patch_size: int, sizes: Mapping[str, Any]) -> VisionConfig:
    return VisionConfig(
        family="siglip",
        **_SWITCHES,
        **sizes,
        image_size=image_size,
        patch_size=patch_size,
        activation="gelu_tanh",
        norm_eps=1e-6,
        select_layer=-2,
        image_mean=_HALVES,
        image_std=_HALVES,
        image_mode="resize",
    )


class Siglip(Clip):
    """No class token, no norm before the first layer; patches with a bias.

    SigLIP2 (arXiv 2502.14786) is the same encoder, trained otherwise, where it reads pictures of one resolution; the
    one that reads any (NaFlex) is another, `siglip2_vision_model`.
    """

    model_type = "siglip_vision_model"
    architecture = "SiglipVisionModel"
    image_processor = "SiglipImageProcessor"
    image_mean = image_std = _HALVES
    switches: ClassVar[Mapping[str, Any]] = _SWITCHES
    defaults: ClassVar[Mapping[str, Any]] = {
        **Clip.defaults,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    }
    presets: ClassVar[Mapping[str, VisionConfig]] = {
        "siglip-so400m-384": _published(384, 14, _SO400M),  # 27 x 27 patches of 14 pixels cover 378 of them
        "siglip2-base-256": _published(256, 16, _BASE),
        "siglip2-so400m-384": _published(384, 14, _SO400M),
        "siglip2-so400m-512": _published(512, 16, _SO400M),
    }


ENCODERS.register("siglip")(Siglip())
