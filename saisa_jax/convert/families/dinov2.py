"""DINOv2's encoders, without registers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from saisa_jax.config import ConfigError, VisionConfig
from saisa_jax.convert.families import ENCODERS
from saisa_jax.convert.family import IMAGENET, Aliases, EncoderFamily, vit_from_hf, vit_to_hf
from saisa_jax.convert.rows import TensorRow, convolution, dense, norm, plain


class Dinov2(EncoderFamily):
    """A class token, no norm before the first layer, and a factor a channel on both branches of a layer."""

    model_type = "dinov2"
    architecture = "Dinov2Model"
    image_processor = "BitImageProcessor"
    switches: ClassVar[Mapping[str, Any]] = {
        "kind": "vit",
        "class_token": True,
        "num_registers": 0,
        "pre_norm": False,
        "patch_bias": True,
        "layer_scale": True,
    }
    only: ClassVar[Mapping[str, Any]] = {"num_channels": 3, "use_swiglu_ffn": False, "qkv_bias": True}
    defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "mlp_ratio": 4,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }
    presets: ClassVar[Mapping[str, VisionConfig]] = {
        "dinov2-small": VisionConfig(
            family="dinov2",
            **switches,
            image_size=518,  # the size of its table of positions, 37 x 37
            patch_size=14,
            embed_dim=384,
            num_layers=12,
            num_heads=6,
            mlp_dim=1536,
            activation="gelu",
            norm_eps=1e-6,
            select_layer=-1,
            post_norm=True,  # DINOv2's patch features are those after the last norm
            image_mean=IMAGENET[0],
            image_std=IMAGENET[1],
            image_mode="square",
        )
    }

    def config_from_hf(
        self, fields: Mapping[str, Any], preprocessor: Mapping[str, Any], select_layer: int
    ) -> dict[str, Any]:
        return vit_from_hf(fields, int(fields["hidden_size"] * fields["mlp_ratio"]))

    def config_to_hf(self, config: VisionConfig) -> dict[str, Any]:
        if config.mlp_dim % config.embed_dim:
            raise ConfigError(f"DINOv2's mlp_dim is a multiple of its width, not {config.mlp_dim}")
        return vit_to_hf(config) | {"mlp_ratio": config.mlp_dim // config.embed_dim}

    def rows(self, config: VisionConfig, root: str) -> Iterator[TensorRow]:
        C, heads, layers = config.embed_dim, config.num_heads, tuple(range(config.num_used_layers))
        places, split = config.positions_per_side**2 + 1, (heads, C // heads)
        embeddings, block, ours = f"{root}embeddings.", f"{root}encoder.layer.{{i}}.", "vision/layers/"
        position = f"{embeddings}position_embeddings"
        yield from convolution(
            "vision/patch_embed", f"{embeddings}patch_embeddings.projection", 3, C, config.patch_size
        )
        yield plain("vision/class_embedding", f"{embeddings}cls_token", (1, 1, C), ours=(C,))
        yield plain("vision/position_embedding", position, (1, places, C), ours=(places, C))
        for name, theirs in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            yield from dense(f"{ours}attn/{name}", f"{block}attention.attention.{theirs}", (C,), split, layers)
        yield from dense(f"{ours}attn/o_proj", f"{block}attention.output.dense", split, (C,), layers)
        yield from dense(f"{ours}mlp/fc1", f"{block}mlp.fc1", (C,), (config.mlp_dim,), layers)
        yield from dense(f"{ours}mlp/fc2", f"{block}mlp.fc2", (config.mlp_dim,), (C,), layers)
        for n in (1, 2):
            yield from norm(f"{ours}norm{n}", f"{block}norm{n}", C, layers)
            yield plain(f"{ours}scale{n}", f"{block}layer_scale{n}.lambda1", (C,), layers)
        if config.num_registers:
            registers = config.num_registers
            yield plain("vision/registers", f"{embeddings}register_tokens", (1, registers, C), ours=(registers, C))
        if config.post_norm:
            yield from norm("vision/post_norm", f"{root}layernorm", C)

    def aliases(self, tower: str) -> Aliases:
        return () if tower else ((rf"{self.model_type}\.", ""),)

    def ignored(self, config: VisionConfig) -> tuple[str, ...]:
        unused = range(config.num_used_layers, config.num_layers)
        return (
            r"embeddings\.mask_token",
            *(rf"encoder\.layer\.{i}\..*" for i in unused),
            *(() if config.post_norm else (r"layernorm\.(weight|bias)",)),
        )


ENCODERS.register("dinov2")(Dinov2())
