"""The one attention call, and its implementations behind one signature.

    xla     plain XLA: any device, dtype and shape; the reference. It alone can return the weights.
    flash   TPU: our own kernel (`attention_tpu.py`); neither scores nor masks in memory
    cudnn   NVIDIA GPU: cuDNN's fused attention (`attention_gpu.py`); 16-bit, and no scores in memory

`model.attention_impl` chooses for whole sequences: training and held-out losses; `auto`, the default, is settled by the
devices when a stage is set up (`parallel.attention_of`), and `xla` elsewhere. Generation has few queries at a time and
always uses `xla`. An implementation that does not support its inputs raises an error; there is no silent fallback.

Axes: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from saisa_jax.models.attention_gpu import cudnn_attention
from saisa_jax.models.attention_tpu import flash_attention
from saisa_jax.models.layers import for_float32_product, keep
from saisa_jax.models.mask import MASKED, KeyBlock, Mask, PackedPositions

KERNELS = {"flash": flash_attention, "cudnn": cudnn_attention}


@jax.named_scope("attend")
def attend(
    q: Float[Array, "B T N H"], blocks: Sequence[KeyBlock], impl: str = "xla"
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T _"] | None]:
    """Softmax attention over several blocks of keys at once, jointly normalised.

    Scores and softmax are float32. The output of a query without any legal key is exactly 0.

    Returns:
      The attention output in the dtype of `q`, and the float32 weights over all blocks in their order (None from
      a kernel; with `xla` the compiler removes them where they are not used).

    Raises:
      ValueError: an unknown `impl`, or a dtype or shape that it does not support.
    """
    q = q * (q.shape[-1] ** -0.5)
    if impl in ("xla", "auto"):
        return _xla_attention(q, blocks)
    if impl not in KERNELS:
        raise ValueError(f"model.attention_impl={impl!r} is unknown; known: xla, {', '.join(KERNELS)}")
    return _on_each_device(KERNELS[impl], q, *_joined(blocks)), None


def _xla_attention(q: Any, blocks: Sequence[KeyBlock]) -> tuple[Any, Any]:
    """The reference implementation; only the weights are concatenated."""
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = blocks[0].k.shape[1]
    grouped = q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)

    scores = []
    for block in blocks:
        operands = for_float32_product(grouped, block.k)
        score = jnp.einsum("btkgh,bksh->bkgts", *operands, preferred_element_type=jnp.float32)
        scores.append(jnp.where(block.mask.allowed[:, None, None], score, MASKED))
    highest = jnp.max(jnp.stack([jnp.max(score, axis=-1) for score in scores]), axis=0)[..., None]
    highest = jax.lax.stop_gradient(jnp.maximum(highest, MASKED / 2))  # a query without a legal key: exp() gives 0
    weights = [jnp.exp(score - highest) for score in scores]
    total = sum(jnp.sum(weight, axis=-1, keepdims=True) for weight in weights)
    inverse = 1.0 / jnp.where(total == 0, 1.0, total)

    out = sum(
        jnp.einsum(
            "bkgts,bksh->btkgh",
            *for_float32_product(weight.astype(q.dtype), block.v),
            preferred_element_type=jnp.float32,
        )
        for weight, block in zip(weights, blocks, strict=True)
    )
    out = out * jnp.moveaxis(inverse, 3, 1)  # [B, K, G, T, 1] -> [B, T, K, G, 1]
    attention = (jnp.concatenate(weights, axis=-1) * inverse).reshape(batch, num_heads, length, -1)
    return keep(out.reshape(q.shape).astype(q.dtype), "attended"), attention


def _joined(blocks: Sequence[KeyBlock]) -> KeyBlock:
    """All blocks as one."""
    if len(blocks) == 1:
        return blocks[0]
    k, v, masks = zip(*blocks, strict=True)
    keys = [jnp.concatenate(parts, axis=1) for parts in zip(*(mask.keys for mask in masks), strict=True)]
    allowed = jnp.concatenate([mask.allowed for mask in masks], axis=2)
    mask = Mask(masks[0].queries, PackedPositions(*keys), allowed, masks[0].window)
    return KeyBlock(jnp.concatenate(k, axis=2), jnp.concatenate(v, axis=2), mask)


def _on_each_device(kernel: Callable[..., Any], q: Any, k: Any, v: Any, mask: Mask) -> Any:
    """Runs a kernel on each device's rows and heads: the compiler cannot partition a kernel.

    Raises:
      ValueError: rows that do not divide over the mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q, k, v, mask)
    table = dict(nn.get_logical_axis_rules())
    rows, heads, kv_heads = (table[f"activation_{name}"] for name in ("batch", "heads", "kv_heads"))
    ways = math.prod(mesh.shape[axis] for axis in jax.tree.leaves(rows))
    if q.shape[0] % ways:
        raise ValueError(f"{q.shape[0]} rows do not divide over {ways} devices of the mesh axes {rows}")
    if heads != kv_heads:  # key/value heads that do not divide over the mesh: every query head gets its own copy
        copies = q.shape[2] // k.shape[1]
        k, v = jnp.repeat(k, copies, axis=1), jnp.repeat(v, copies, axis=1)
    of_queries, of_keys = PartitionSpec(rows, None, heads), PartitionSpec(rows, heads)
    specs = of_queries, of_keys, of_keys, PartitionSpec(rows)
    # The kernels do not declare how their outputs vary over the mesh, so that it cannot be checked.
    return jax.shard_map(kernel, in_specs=specs, out_specs=of_queries, check_vma=False)(q, k, v, mask)


def attention_of_text(attention: Float[Array, "B N S K"], tokens: int, role: str) -> dict[str, Any]:
    """A layer's weights as they are captured: rows of the text, columns of all visual tokens, then text.

    Args:
      attention: as the layer had it.
      tokens: V, visual tokens of a row.
      role: theirs in the layer (`ModelConfig.visual_roles`).

    Returns:
      attention [B, N, T, V + T], and image_attention [B, T]: the share on visual tokens, averaged over heads.
    """
    if role == "queries":
        attention = attention[:, :, tokens:]
    elif role == "none":  # columns for the image, which it does not attend to
        attention = jnp.pad(attention, [(0, 0)] * 3 + [(tokens, 0)])
    of_image = jnp.mean(jnp.sum(attention[..., :tokens], axis=-1), axis=1)
    return {"attention": attention, "image_attention": of_image}
