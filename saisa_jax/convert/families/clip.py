"""CLIP's vision encoders, and what all ViTs have in common whose tensors are named as CLIP's are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from saisa_jax.config import VisionConfig
from saisa_jax.convert.families import ENCODERS
from saisa_jax.convert.family import Aliases, EncoderFamily, vit_from_hf, vit_to_hf
from saisa_jax.convert.rows import TensorRow, convolution, dense, norm, plain


class Clip(EncoderFamily):
    """A class token and a norm before the first layer; patches without a bias."""

    model_type = "clip_vision_model"
    architecture = "CLIPVisionModel"
    image_processor = "CLIPImageProcessor"
    image_mean = (0.48145466, 0.4578275, 0.40821073)
    image_std = (0.26862954, 0.26130258, 0.27577711)
    switches: ClassVar[Mapping[str, Any]] = {
        "kind": "vit",
        "class_token": True,
        "num_registers": 0,
        "pre_norm": True,
        "patch_bias": False,
        "layer_scale": False,
    }
    only: ClassVar[Mapping[str, Any]] = {"num_channels": 3}
    defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
    presets: ClassVar[Mapping[str, VisionConfig]] = {
        "clip-vit-l-336": VisionConfig(
            family="clip",
            **switches,
            image_size=336,
            patch_size=14,
            embed_dim=1024,
            num_layers=24,
            num_heads=16,
            mlp_dim=4096,
            activation="quick_gelu",
            norm_eps=1e-5,
            select_layer=-2,  # LLaVA-1.5 and SAISA
            image_mean=image_mean,
            image_std=image_std,
            image_mode="pad",
        )
    }

    def config_from_hf(
        self, fields: Mapping[str, Any], preprocessor: Mapping[str, Any], select_layer: int
    ) -> dict[str, Any]:
        return vit_from_hf(fields, fields["intermediate_size"])

    def config_to_hf(self, config: VisionConfig) -> dict[str, Any]:
        return vit_to_hf(config) | {"intermediate_size": config.mlp_dim}

    def rows(self, config: VisionConfig, root: str) -> Iterator[TensorRow]:
        C, heads, layers = config.embed_dim, config.num_heads, tuple(range(config.num_used_layers))
        places, split = config.positions_per_side**2 + config.class_token, (heads, C // heads)
        embeddings, block, ours = f"{root}embeddings.", f"{root}encoder.layers.{{i}}.", "vision/layers/"
        bias = config.patch_bias
        yield from convolution("vision/patch_embed", f"{embeddings}patch_embedding", 3, C, config.patch_size, bias=bias)
        if config.class_token:
            yield plain("vision/class_embedding", f"{embeddings}class_embedding", (C,))
        yield plain("vision/position_embedding", f"{embeddings}position_embedding.weight", (places, C))
        if config.pre_norm:
            yield from norm("vision/pre_norm", f"{root}pre_layrnorm", C)  # so spelt there
        for name in ("q_proj", "k_proj", "v_proj"):
            yield from dense(f"{ours}attn/{name}", f"{block}self_attn.{name}", (C,), split, layers)
        yield from dense(f"{ours}attn/o_proj", f"{block}self_attn.out_proj", split, (C,), layers)
        yield from dense(f"{ours}mlp/fc1", f"{block}mlp.fc1", (C,), (config.mlp_dim,), layers)
        yield from dense(f"{ours}mlp/fc2", f"{block}mlp.fc2", (config.mlp_dim,), (C,), layers)
        for n in (1, 2):
            yield from norm(f"{ours}norm{n}", f"{block}layer_norm{n}", C, layers)
        if config.post_norm:
            yield from norm("vision/post_norm", f"{root}post_layernorm", C)

    def root(self, tower: str) -> str:
        return f"{tower}vision_model."

    def aliases(self, tower: str) -> Aliases:
        # transformers 5 leaves `vision_model.` out.
        bare = re.escape(tower) + r"(?=(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.)"
        return ((bare, self.root(tower)),)

    def ignored(self, config: VisionConfig) -> tuple[str, ...]:
        unused = range(config.num_used_layers, config.num_layers)
        return (
            r"embeddings\.position_ids",
            r"head\..*",
            *(rf"encoder\.layers\.{i}\..*" for i in unused),
            *(() if config.post_norm else (r"post_layernorm\.(weight|bias)",)),
        )

    def beside(self) -> tuple[str, ...]:
        return (r"text_model\..*", r"logit_(scale|bias)", r"(visual|text)_projection\.weight")


ENCODERS.register("clip")(Clip())
