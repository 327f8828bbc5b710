"""ConvNeXt's encoders; its layers are stages, and it reads images of any size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from saisa_jax.config import ConfigError, VisionConfig
from saisa_jax.convert.families import ENCODERS
from saisa_jax.convert.family import IMAGENET, Aliases, EncoderFamily, activation_from_hf, activation_to_hf
from saisa_jax.convert.rows import TensorRow, convolution, dense, norm, plain
from saisa_jax.models.encoders.convnext import EXPANSION, KERNEL


class ConvNext(EncoderFamily):
    """Stages of blocks; a norm's epsilon is no field of its files, but of the classifier's."""

    model_type = "convnext"
    architecture = "ConvNextModel"
    image_processor = "ConvNextImageProcessor"
    switches: ClassVar[Mapping[str, Any]] = {"kind": "convnext", "class_token": False, "pre_norm": False}
    only: ClassVar[Mapping[str, Any]] = {"num_channels": 3}
    defaults: ClassVar[Mapping[str, Any]] = {
        "hidden_sizes": (96, 192, 384, 768),
        "depths": (3, 3, 9, 3),
        "patch_size": 4,
        "image_size": 224,
        "hidden_act": "gelu",
        "layer_scale_init_value": 1e-6,
    }
    select_layer = -1
    in_llava_hf = False
    presets: ClassVar[Mapping[str, VisionConfig]] = {
        "convnext-xlarge-384": VisionConfig(
            family="convnext",
            **switches,
            patch_bias=True,
            image_size=384,
            patch_size=32,
            embed_dim=2048,
            num_layers=4,
            depths=(3, 3, 27, 3),
            widths=(256, 512, 1024, 2048),
            activation="gelu",
            norm_eps=1e-6,
            layer_scale=True,
            select_layer=-1,
            image_mean=IMAGENET[0],
            image_std=IMAGENET[1],
            image_mode="pad",
        )
    }

    def config_from_hf(
        self, fields: Mapping[str, Any], preprocessor: Mapping[str, Any], select_layer: int
    ) -> dict[str, Any]:
        depths, widths = tuple(fields["depths"]), tuple(fields["hidden_sizes"])
        if len(depths) != len(widths):
            raise ConfigError(f"depths={depths} and hidden_sizes={widths} are not of one length")
        last = max(select_layer % (len(depths) + 1), 1) - 1  # the stage that is put out
        # The weights fit every size; published ones were trained on the preprocessor's, whatever config.json says.
        size = preprocessor.get("size", fields["image_size"])
        if isinstance(size, Mapping):
            size = size.get("shortest_edge", size.get("height"))
        return {
            "image_size": size,
            "patch_size": fields["patch_size"] * 2**last,
            "embed_dim": widths[last],
            "num_layers": len(depths),
            "depths": depths,
            "widths": widths,
            "patch_bias": True,
            "activation": activation_from_hf(fields),
            "norm_eps": 1e-6,  # of all norms but the one before the classifier, which layer_norm_eps sets
            "layer_scale": fields["layer_scale_init_value"] > 0,
        }

    def config_to_hf(self, config: VisionConfig) -> dict[str, Any]:
        return {
            "image_size": config.image_size,
            "patch_size": config.stem_size,
            "num_stages": config.num_layers,
            "depths": list(config.depths),
            "hidden_sizes": list(config.widths),
            "hidden_act": activation_to_hf(config.activation),
            "layer_scale_init_value": 1e-6 if config.layer_scale else 0.0,
        }

    def rows(self, config: VisionConfig, root: str) -> Iterator[TensorRow]:
        widths, embeddings = config.widths, f"{root}embeddings."
        yield from convolution("vision/patch_embed", f"{embeddings}patch_embeddings", 3, widths[0], config.stem_size)
        yield from norm("vision/embed_norm", f"{embeddings}layernorm", widths[0])
        for stage in range(config.num_used_layers):
            C, ours, theirs = widths[stage], f"vision/stages_{stage}", f"{root}encoder.stages.{stage}."
            if stage:
                before, downsampling = widths[stage - 1], f"{theirs}downsampling_layer."
                yield from norm(f"{ours}/norm", f"{downsampling}0", before)
                yield from convolution(f"{ours}/downsample", f"{downsampling}1", before, C, 2)
            layers, block, ours = tuple(range(config.depths[stage])), f"{theirs}layers.{{i}}.", f"{ours}/layers"
            yield from convolution(f"{ours}/depthwise", f"{block}dwconv", 1, C, KERNEL, layers)
            yield from norm(f"{ours}/norm", f"{block}layernorm", C, layers)
            yield from dense(f"{ours}/mlp/fc1", f"{block}pwconv1", (C,), (EXPANSION * C,), layers)
            yield from dense(f"{ours}/mlp/fc2", f"{block}pwconv2", (EXPANSION * C,), (C,), layers)
            if config.layer_scale:
                yield plain(f"{ours}/scale", f"{block}layer_scale_parameter", (C,), layers)

    def aliases(self, tower: str) -> Aliases:
        return () if tower else ((r"convnext\.", ""),)

    def ignored(self, config: VisionConfig) -> tuple[str, ...]:
        unused = range(config.num_used_layers, config.num_layers)
        return (
            r"layernorm\.(weight|bias)",
            r"classifier\.(weight|bias)",
            *(rf"encoder\.stages\.{i}\..*" for i in unused),
        )


ENCODERS.register("convnext")(ConvNext())
