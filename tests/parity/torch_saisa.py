"""SAISA in a few lines of torch, on the tensors of a checkpoint in the official layout: equation (1) of the README."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, gelu, linear, silu


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return scale * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rotated(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """x [S, heads, H], its halves turned against each other."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] / theta ** (torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def logits(
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    features: Tensor,
    tokens: Tensor,
    text_places: Tensor,
    visual_places: Tensor,
    vica: Collection[int] | None = None,
) -> Tensor:
    """[T, W] of text tokens [T] that read the features [V, C] of pictures; places are positions in the whole row.

    With `vica` the weights are LLaVA's and these layers alone see the picture, as `modeling_llama_mask.py` of
    EIT-NLP/ViCA computes a model of 7B: text before the picture gets nothing of attention.
    """
    eps, heads, theta = config["rms_norm_eps"], config["num_attention_heads"], config["rope_theta"]
    groups = config.get("num_key_value_heads", heads)
    places = torch.cat([visual_places, text_places])
    may_read = text_places[:, None] >= places[None]
    x = embedding(tokens, weights["model.embed_tokens.weight"])
    frozen = torch.zeros(len(tokens), dtype=torch.bool) if vica is None else text_places < visual_places.min()
    of_picture = torch.arange(len(places)) < len(visual_places)
    for layer in range(config["num_hidden_layers"]):
        of = {key.split(".", 3)[3]: value for key, value in weights.items() if key.startswith(f"model.layers.{layer}.")}
        at, where = ("", of) if vica is None else ("model.", weights)
        visual = gelu(linear(features, where[f"{at}mm_projector.0.weight"], where[f"{at}mm_projector.0.bias"]))
        visual = linear(visual, where[f"{at}mm_projector.2.weight"], where[f"{at}mm_projector.2.bias"])
        legal = may_read if vica is None or layer in vica else may_read & ~of_picture
        h = rms_norm(x, of["input_layernorm.weight"], eps)
        read = torch.cat([rms_norm(visual, of["input_layernorm.weight"], eps), h])
        q = rotated(linear(h, of["self_attn.q_proj.weight"]).unflatten(-1, (heads, -1)), text_places, theta)
        k = rotated(linear(read, of["self_attn.k_proj.weight"]).unflatten(-1, (groups, -1)), places, theta)
        v = linear(read, of["self_attn.v_proj.weight"]).unflatten(-1, (groups, -1))
        k, v = (y.repeat_interleave(heads // groups, 1) for y in (k, v))
        scores = torch.einsum("tnh,snh->nts", q, k) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~legal, -torch.inf).softmax(-1).masked_fill(frozen[:, None], 0)
        x = x + linear(torch.einsum("nts,snh->tnh", scores, v).flatten(1), of["self_attn.o_proj.weight"])
        h = rms_norm(x, of["post_attention_layernorm.weight"], eps)
        h = silu(linear(h, of["mlp.gate_proj.weight"])) * linear(h, of["mlp.up_proj.weight"])
        x = x + linear(h, of["mlp.down_proj.weight"])
    return linear(rms_norm(x, weights["model.norm.weight"], eps), weights["lm_head.weight"])
