"""cuDNN's fused attention for NVIDIA GPUs, through `jax.nn`.

cuDNN adds the mask to the scores as a bias [B, 1, T, S] of the activations' dtype, made once for all layers. The scores
[B, N, T, S] never exist; tiles without a legal pair are computed all the same. It supports bfloat16 and float16, heads
of a multiple of 8 dimensions up to 128 (256 on Hopper and later), grouped queries, and any T and S, padded here to
even.

Axes: B batch, T queries, S keys, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from saisa_jax.models.mask import Mask

MAX_HEAD_DIM = 256


def cudnn_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], mask: Mask
) -> Float[Array, "B T N H"]:
    """Softmax attention of `q`, already scaled.

    The output of a query without a legal key is exactly 0, and no gradient passes through it.

    Raises:
      ValueError: a dtype or a head_dim that cuDNN does not support.
      RuntimeError, NotImplementedError: JAX finds no cuDNN, or one that is too old for the shape.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"model.attention_impl=cudnn is for bfloat16 and float16, not model.dtype={q.dtype}; set "
            "model.dtype=bfloat16 or model.attention_impl=xla"
        )
    head_dim = q.shape[-1]
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        nearest = min(-(-head_dim // 8) * 8, MAX_HEAD_DIM)
        raise ValueError(
            f"model.attention_impl=cudnn needs a model.head_dim that is a multiple of 8 up to {MAX_HEAD_DIM}, such as "
            f"{nearest}, not {head_dim}; set model.attention_impl=xla"
        )
    length = q.shape[1]
    out = jax.nn.dot_product_attention(
        _even(q, 1),
        _even(k.swapaxes(1, 2), 1),
        _even(v.swapaxes(1, 2), 1),
        mask=_even(_even(mask.allowed, 1), 2)[:, None],
        scale=1.0,
        implementation="cudnn",
    )
    # Without this the output of a query without a legal key would be the average of all values.
    reads = jnp.any(mask.allowed, axis=2)
    return jnp.where(reads[:, :, None, None], out[:, :length], 0)


def _even(x: jax.Array, axis: int) -> jax.Array:
    """Pads an odd length by one: with a bias, cuDNN's backward pass needs even lengths. The mask hides the padding."""
    return jnp.pad(x, [(0, x.shape[i] % 2 if i == axis else 0) for i in range(x.ndim)])
