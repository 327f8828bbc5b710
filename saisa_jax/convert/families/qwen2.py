"""Qwen2's decoders: Llama's with biases of queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from saisa_jax.config import ConfigError, ModelConfig
from saisa_jax.convert.families import DECODERS
from saisa_jax.convert.families.llama import Llama, decoder_to_hf


class Qwen2(Llama):
    """Biases; its window, in some layers only, is not supported."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    llava = ("llava_qwen", "LlavaQwenForCausalLM")
    also = ()
    extras = frozenset({"qkv_bias"})
    defaults: ClassVar[Mapping[str, Any]] = {
        **Llama.defaults,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
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
        }
    }

    def config_from_hf(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        if fields.get("use_sliding_window"):
            raise ConfigError("use_sliding_window=True, a window in some layers only, is not supported")
        return {**super().config_from_hf(fields), "qkv_bias": True}

    def config_to_hf(self, config: ModelConfig) -> dict[str, Any]:
        if config.head_dim * config.num_heads != config.embed_dim:
            raise ConfigError("Qwen2's classes have no head_dim of its own: model.head_dim x num_heads != embed_dim")
        return decoder_to_hf(config) | {"use_sliding_window": False}


DECODERS.register("qwen2")(Qwen2())
