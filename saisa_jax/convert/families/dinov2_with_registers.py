"""DINOv2's encoders with registers (arXiv 2309.16588): tokens for what patches would else keep of the whole picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from saisa_jax.config import ConfigError, VisionConfig
from saisa_jax.convert.families import ENCODERS
from saisa_jax.convert.families.dinov2 import Dinov2


class Dinov2WithRegisters(Dinov2):
    """How many, its config.json says; positions are resampled with antialiasing, which DINOv2 without does not do."""

    model_type = "dinov2_with_registers"
    architecture = "Dinov2WithRegistersModel"
    switches: ClassVar[Mapping[str, Any]] = {k: v for k, v in Dinov2.switches.items() if k != "num_registers"}
    defaults: ClassVar[Mapping[str, Any]] = {**Dinov2.defaults, "patch_size": 16, "num_register_tokens": 4}
    in_llava_hf = False
    presets: ClassVar[Mapping[str, VisionConfig]] = {
        f"dinov2-with-registers-{name}": dataclasses.replace(
            Dinov2.presets["dinov2-small"], family="dinov2_with_registers", num_registers=4, **sizes
        )
        for name, sizes in (
            ("base", {"embed_dim": 768, "num_heads": 12, "mlp_dim": 3072}),
            ("large", {"embed_dim": 1024, "num_layers": 24, "num_heads": 16, "mlp_dim": 4096}),
        )
    }

    def config_from_hf(
        self, fields: Mapping[str, Any], preprocessor: Mapping[str, Any], select_layer: int
    ) -> dict[str, Any]:
        return {
            **super().config_from_hf(fields, preprocessor, select_layer),
            "num_registers": fields["num_register_tokens"],
        }

    def config_to_hf(self, config: VisionConfig) -> dict[str, Any]:
        if not config.num_registers:
            raise ConfigError(
                "model.vision.num_registers=0: an encoder without registers is of model.vision.family=dinov2"
            )
        return super().config_to_hf(config) | {"num_register_tokens": config.num_registers}


ENCODERS.register("dinov2_with_registers")(Dinov2WithRegisters())
