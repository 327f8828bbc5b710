"""SmolLM3's decoders: Llama's, of which every fourth layer does not rotate (NoPE)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from saisa_jax.config import ConfigError, ModelConfig
from saisa_jax.convert.families import DECODERS
from saisa_jax.convert.families.llama import Llama

PERIOD = 4  # of the layers that do not rotate, where config.json does not list them


class SmolLM3(Llama):
    """Layers without rotary positions; one without any is written as Llama, which is the same."""

    model_type = "smollm3"
    architecture = "SmolLM3ForCausalLM"
    llava = ("llava_smollm3", "LlavaSmolLM3ForCausalLM")
    also = ()
    extras = frozenset({"unrotated_layers"})
    only: ClassVar[Mapping[str, Any]] = {**Llama.only, "use_sliding_window": False}
    defaults: ClassVar[Mapping[str, Any]] = {
        **Llama.defaults,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": PERIOD,
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smollm3-3b": {
            "vocab_size": 128256,
            "embed_dim": 2048,
            "num_layers": 36,
            "num_heads": 16,
            "num_kv_heads": 4,
            "head_dim": 128,
            "mlp_dim": 11008,
            "rope_theta": 5e6,
            "norm_eps": 1e-6,
            "max_length": 65536,
            "tie_embeddings": True,
            "unrotated_layers": tuple(range(PERIOD - 1, 36, PERIOD)),
        }
    }

    def config_from_hf(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        layers, period = range(fields["num_hidden_layers"]), fields["no_rope_layer_interval"]
        rotates = fields.get("no_rope_layers")  # so called, and 1 where it is rotated
        if rotates is None:
            rotates = [(layer + 1) % period for layer in layers]
        if len(rotates) < len(layers):
            raise ConfigError(f"no_rope_layers={rotates} has no entry for each of num_hidden_layers={len(layers)}")
        unrotated = tuple(layer for layer in layers if not rotates[layer])
        return {**super().config_from_hf(fields), "unrotated_layers": unrotated}

    def config_to_hf(self, config: ModelConfig) -> dict[str, Any]:
        rotates = [int(layer not in config.unrotated_layers) for layer in range(config.num_layers)]
        # Its class has a padding token of its own, which need not be in the vocabulary.
        return super().config_to_hf(config) | {"no_rope_layers": rotates, "pad_token_id": None}


DECODERS.register("smollm3")(SmolLM3())
