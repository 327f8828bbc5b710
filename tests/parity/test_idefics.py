"""Flamingo against transformers' IDEFICS, which is its open form: random weights, open gates, images anywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from saisa_jax.config import FlamingoConfig, ModelConfig
from saisa_jax.models.saisa import Saisa, init_params
from saisa_jax.testing.batches import IMAGE, make_batch
from saisa_jax.testing.configs import tiny_config
from saisa_jax.testing.gates import with_open_gates
from saisa_jax.training.optimizer import flatten

torch = pytest.importorskip("torch", reason="CPU torch is not installed")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

NAMES = {"input_norm/scale": "input_layernorm.weight", "post_attn_norm/scale": "post_attention_layernorm.weight"}
GATES = {"attn_gate": "alpha_cross_attn", "mlp_gate": "alpha_dense"}
LAYOUTS = [[5, 6, IMAGE, 7, 8, 9], [3, IMAGE, IMAGE, 4], [4, 5, 11, 12]]  # the last one sees no image


def theirs(params: Any, stack: str, attn: str) -> Iterator[tuple[str, np.ndarray]]:
    """A stack of ours as the tensors of their layers."""
    for path, leaf in flatten(params).items():
        for i, layer in enumerate(np.asarray(leaf)):
            part, _, kind = path.partition("/")
            if path in GATES:
                yield f"{stack}.{i}.{GATES[path]}", layer[None]
            elif path in NAMES:
                yield f"{stack}.{i}.{NAMES[path]}", layer
            else:
                inputs = 2 if "o_proj" in kind else 1
                matrix = layer.reshape(int(np.prod(layer.shape[:inputs])), -1).T
                module = attn if part == "attn" else part
                yield f"{stack}.{i}.{module}.{kind.removesuffix('/kernel')}.weight", matrix


def idefics(config: ModelConfig, params: Any) -> Any:
    model = transformers.IdeficsModel(
        transformers.IdeficsConfig(
            vocab_size=config.padded_vocab_size,
            additional_vocab_size=0,
            hidden_size=config.embed_dim,
            intermediate_size=config.mlp_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            rms_norm_eps=config.norm_eps,
            cross_layer_interval=config.flamingo.every,
            alpha_type="float",
            use_resampler=False,
            pad_token_id=0,
            vision_config={"embed_dim": config.embed_dim, "num_hidden_layers": 1, "num_attention_heads": 2},
        )
    )
    tensors = {
        "embed_tokens.weight": params["embed_tokens"]["embedding"],
        "norm.weight": params["final_norm"]["scale"],
        **dict(theirs(params["layers"], "layers", "self_attn")),
        **dict(theirs(params["cross_layers"], "gated_cross_attn_layers", "cross_attn")),
    }
    found = model.load_state_dict({key: torch.tensor(np.array(x)) for key, x in tensors.items()}, strict=False)
    assert not found.unexpected_keys
    assert all(key.startswith("vision_model.") or "rotary" in key for key in found.missing_keys)
    return model.eval()


def test_flamingo_is_idefics() -> None:
    config = dataclasses.replace(
        tiny_config("flamingo").model, num_layers=4, num_kv_heads=4, flamingo=FlamingoConfig(every=2)
    )
    params = with_open_gates(init_params(config, jax.random.key(0)))
    batch = make_batch(config, LAYOUTS, text_length=6, max_images=2)
    model = Saisa(config).bind({"params": params})
    _, aux = model.hidden(batch, capture=("features", "final_norm"))
    tokens = np.asarray(model._before_layers(aux["features"])).reshape(len(LAYOUTS), 2, -1, config.embed_dim)

    text = batch["segment_ids"] > 0
    after = batch["positions"][:, :, None] > batch["image_positions"][:, None]
    seen = after & (batch["image_segment_ids"] > 0)[:, None] & text[:, :, None]
    with torch.no_grad():
        out = idefics(config, params)(
            input_ids=torch.tensor(np.array(batch["tokens"]), dtype=torch.long),
            attention_mask=torch.tensor(np.array(text), dtype=torch.long),
            position_ids=torch.tensor(np.array(batch["positions"]), dtype=torch.long),
            image_encoder_embeddings=torch.tensor(tokens),
            image_attention_mask=torch.tensor(np.array(seen), dtype=torch.long),
        )
    expected = out.last_hidden_state.numpy()
    np.testing.assert_allclose(np.asarray(aux["final_norm"])[text], expected[text], atol=1e-4)
