"""Qwen3's decoders: Llama's with a norm over each head's queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from saisa_jax.convert.families import DECODERS
from saisa_jax.convert.families.llama import Llama

_ALL: Mapping[str, Any] = {
    "vocab_size": 151936,
    "num_kv_heads": 8,
    "head_dim": 128,
    "rope_theta": 1e6,
    "norm_eps": 1e-6,
    "max_length": 40960,
    "qk_norm": True,
}
_TIED = {**_ALL, "tie_embeddings": True}


class Qwen3(Llama):
    """Norms of queries and keys; its window, in some layers only, is not supported."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    llava = ("llava_qwen3", "LlavaQwen3ForCausalLM")
    also = ()
    extras = frozenset({"qk_norm"})
    only: ClassVar[Mapping[str, Any]] = {**Llama.only, "use_sliding_window": False}
    defaults: ClassVar[Mapping[str, Any]] = {
        **Llama.defaults,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "qwen3-0.6b": {**_TIED, "embed_dim": 1024, "num_layers": 28, "num_heads": 16, "mlp_dim": 3072},
        "qwen3-1.7b": {**_TIED, "embed_dim": 2048, "num_layers": 28, "num_heads": 16, "mlp_dim": 6144},
        "qwen3-4b": {**_TIED, "embed_dim": 2560, "num_layers": 36, "num_heads": 32, "mlp_dim": 9728},
        "qwen3-8b": {**_ALL, "embed_dim": 4096, "num_layers": 36, "num_heads": 32, "mlp_dim": 12288},
    }

    def config_from_hf(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().config_from_hf(fields), "qk_norm": True}


DECODERS.register("qwen3")(Qwen3())
