"""Llama's decoders, Vicuna and SmolLM2 among them, and what all decoders have in common that are built like it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from saisa_jax.config import ConfigError, ModelConfig, RopeScalingConfig
from saisa_jax.convert.families import DECODERS
from saisa_jax.convert.family import EXTRAS, DecoderFamily
from saisa_jax.convert.rows import TensorRow, dense, plain

_LINEAR = {"factor": ("factor", float)}
_LLAMA3 = _LINEAR | {
    "low_freq_factor": ("low_freq_factor", float),
    "high_freq_factor": ("high_freq_factor", float),
    "original_max_position_embeddings": ("original_max_length", int),
}
# Their rope_type -> our kind, and the fields that come with it.
ROPE_SCALINGS: dict[str, tuple[str, dict[str, tuple[str, type]]]] = {
    "default": ("none", {}),
    "linear": ("linear", _LINEAR),
    "llama3": ("llama3", _LLAMA3),
}

_LLAMA_3_2: Mapping[str, Any] = {
    "vocab_size": 128256,
    "num_kv_heads": 8,
    "mlp_dim": 8192,
    "rope_theta": 5e5,
    "rope_scaling": RopeScalingConfig("llama3", factor=32.0),
    "norm_eps": 1e-5,
    "max_length": 131072,
    "tie_embeddings": True,
}


class Llama(DecoderFamily):
    """None of EXTRAS; what inherits from it names those that its decoders have."""

    extras: ClassVar[frozenset[str]] = frozenset()

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    llava = ("llava_llama", "LlavaLlamaForCausalLM")
    also = ("llava",)
    only: ClassVar[Mapping[str, Any]] = {
        "hidden_act": "silu",
        "mlp_bias": False,
        "attention_bias": False,
        "partial_rotary_factor": 1,
    }
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "vicuna-7b": {  # v1.5, of Llama-2
            "vocab_size": 32000,
            "embed_dim": 4096,
            "num_layers": 32,
            "num_heads": 32,
            "num_kv_heads": 32,
            "head_dim": 128,
            "mlp_dim": 11008,
            "rope_theta": 1e4,
            "norm_eps": 1e-5,
            "max_length": 4096,
        },
        "vicuna-13b": {  # v1.5, of Llama-2
            "vocab_size": 32000,
            "embed_dim": 5120,
            "num_layers": 40,
            "num_heads": 40,
            "num_kv_heads": 40,
            "head_dim": 128,
            "mlp_dim": 13824,
            "rope_theta": 1e4,
            "norm_eps": 1e-5,
            "max_length": 4096,
        },
        "llama3-8b": {  # 3, not 3.1: no scaling of the rotary frequencies
            "vocab_size": 128256,
            "embed_dim": 4096,
            "num_layers": 32,
            "num_heads": 32,
            "num_kv_heads": 8,
            "head_dim": 128,
            "mlp_dim": 14336,
            "rope_theta": 5e5,
            "norm_eps": 1e-5,
            "max_length": 8192,
        },
        "llama3.2-1b": {**_LLAMA_3_2, "embed_dim": 2048, "num_layers": 16, "num_heads": 32, "head_dim": 64},
        "llama3.2-3b": {**_LLAMA_3_2, "embed_dim": 3072, "num_layers": 28, "num_heads": 24, "head_dim": 128},
        "smollm2-135m": {
            "vocab_size": 49152,
            "embed_dim": 576,
            "num_layers": 30,
            "num_heads": 9,
            "num_kv_heads": 3,
            "head_dim": 64,
            "mlp_dim": 1536,
            "rope_theta": 1e5,
            "norm_eps": 1e-5,
            "max_length": 8192,
            "tie_embeddings": True,
        },
    }

    def holds(self, config: ModelConfig) -> bool:
        return self.extras == {name for name in EXTRAS if getattr(config, name)}

    def config_from_hf(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        heads = fields["num_attention_heads"]
        # transformers 4 writes rope_theta beside rope_scaling, transformers 5 both in one as rope_parameters.
        rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
        return {
            "vocab_size": fields["vocab_size"],
            "embed_dim": fields["hidden_size"],
            "num_layers": fields["num_hidden_layers"],
            "num_heads": heads,
            "num_kv_heads": fields.get("num_key_value_heads") or heads,
            "head_dim": fields.get("head_dim") or fields["hidden_size"] // heads,
            "mlp_dim": fields["intermediate_size"],
            "rope_theta": float(rope.get("rope_theta") or fields["rope_theta"]),
            "rope_scaling": _rope_scaling(rope),
            "norm_eps": float(fields["rms_norm_eps"]),
            "max_length": fields["max_position_embeddings"],
            "tie_embeddings": fields["tie_word_embeddings"],
        }

    def config_to_hf(self, config: ModelConfig) -> dict[str, Any]:
        return decoder_to_hf(config) | {"attention_bias": False, "mlp_bias": False}

    def rows(self, config: ModelConfig, body: str, head: str) -> Iterator[TensorRow]:
        D, F, H = config.embed_dim, config.mlp_dim, config.head_dim
        N, K, W, padded = config.num_heads, config.num_kv_heads, config.vocab_size, config.padded_vocab_size
        layers, bias = tuple(range(config.num_layers)), config.qkv_bias
        attn, mlp = f"{body}layers.{{i}}.self_attn.", f"{body}layers.{{i}}.mlp."
        yield plain("embed_tokens/embedding", f"{body}embed_tokens.weight", (W, D), ours=(padded, D))
        for name, heads in (("q_proj", N), ("k_proj", K), ("v_proj", K)):
            yield from dense(f"layers/attn/{name}", f"{attn}{name}", (D,), (heads, H), layers, bias)
        yield from dense("layers/attn/o_proj", f"{attn}o_proj", (N, H), (D,), layers, False)
        for name, inputs, outputs in (("gate_proj", D, F), ("up_proj", D, F), ("down_proj", F, D)):
            yield from dense(f"layers/mlp/{name}", f"{mlp}{name}", (inputs,), (outputs,), layers, False)
        for ours, theirs in (("attn/q_norm", "q_norm"), ("attn/k_norm", "k_norm")) if config.qk_norm else ():
            yield plain(f"layers/{ours}/scale", f"{attn}{theirs}.weight", (H,), layers)
        for ours, theirs in (("input_norm", "input_layernorm"), ("post_attn_norm", "post_attention_layernorm")):
            yield plain(f"layers/{ours}/scale", f"{body}layers.{{i}}.{theirs}.weight", (D,), layers)
        yield plain("final_norm/scale", f"{body}norm.weight", (D,))
        if not config.tie_embeddings:
            yield TensorRow("decoder", "lm_head/kernel", f"{head}weight", (W, D), (D, padded), (1, 0))

    def ignored(self) -> tuple[str, ...]:
        return (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)  # a constant that old files carry


def decoder_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Fields of config.json that all decoders of this build spell alike."""
    raw: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
    }
    scaling = config.rope_scaling
    if scaling.kind != "none":
        wanted = next(wanted for ours, wanted in ROPE_SCALINGS.values() if ours == scaling.kind)
        fields = {name: getattr(scaling, field) for name, (field, _) in wanted.items()}
        # transformers before 4.43 take exactly `type` and `factor`, and later ones read `type` too.
        raw["rope_scaling"] = {"type" if scaling.kind == "linear" else "rope_type": scaling.kind, **fields}
    return raw


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScalingConfig:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_SCALINGS:
        known = ", ".join(ROPE_SCALINGS)
        raise ConfigError(f"rotary embeddings of type {kind!r} are not supported; known: {known}")
    if (rope.get("partial_rotary_factor") or 1) != 1:
        raise ConfigError(f"partial_rotary_factor={rope['partial_rotary_factor']} is not supported, only 1")
    ours, wanted = ROPE_SCALINGS[kind]
    missing = [name for name in wanted if rope.get(name) is None]
    if missing:
        raise ConfigError(f"rotary embeddings of type {kind!r} lack {', '.join(missing)}")
    return RopeScalingConfig(ours, **{field: type_(rope[name]) for name, (field, type_) in wanted.items()})


DECODERS.register("llama")(Llama())
