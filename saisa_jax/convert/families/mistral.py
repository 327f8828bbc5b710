"""Mistral's decoders: Llama's with a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from saisa_jax.config import ModelConfig
from saisa_jax.convert.families import DECODERS
from saisa_jax.convert.families.llama import Llama, decoder_to_hf


class Mistral(Llama):
    """A window in every layer; one without is written as Llama, which is the same."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    llava = ("llava_mistral", "LlavaMistralForCausalLM")
    also = ()
    extras = frozenset({"sliding_window"})
    defaults: ClassVar[Mapping[str, Any]] = {
        **Llama.defaults,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
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
        }
    }

    def config_from_hf(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().config_from_hf(fields), "sliding_window": fields.get("sliding_window")}

    def config_to_hf(self, config: ModelConfig) -> dict[str, Any]:
        return decoder_to_hf(config) | {"sliding_window": config.sliding_window}


DECODERS.register("mistral")(Mistral())
