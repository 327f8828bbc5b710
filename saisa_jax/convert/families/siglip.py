"""SigLIP's vision encoders: CLIP's names, without a class token and a norm before the layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from saisa_jax.config import VisionConfig
from saisa_jax.convert.families import ENCODERS
from saisa_jax.convert.families.clip import Clip


class Siglip(Clip):
    """No class token, no norm before the first layer; patches with a bias."""

    model_type = "siglip_vision_model"
    architecture = "SiglipVisionModel"
    image_processor = "SiglipImageProcessor"
    image_mean = image_std = (0.5, 0.5, 0.5)
    switches: ClassVar[Mapping[str, Any]] = {
        "kind": "vit",
        "class_token": False,
        "pre_norm": False,
        "patch_bias": True,
        "layer_scale": False,
    }
    defaults: ClassVar[Mapping[str, Any]] = {
        **Clip.defaults,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    }
    presets: ClassVar[Mapping[str, VisionConfig]] = {
        "siglip-so400m-384": VisionConfig(
            family="siglip",
            **switches,
            image_size=384,  # 27 x 27 patches of 14 pixels cover 378 of them
            patch_size=14,
            embed_dim=1152,
            num_layers=27,
            num_heads=16,
            mlp_dim=4304,
            activation="gelu_tanh",
            norm_eps=1e-6,
            select_layer=-2,
            image_mean=image_mean,
            image_std=image_std,
            image_mode="resize",
        )
    }


ENCODERS.register("siglip")(Siglip())
