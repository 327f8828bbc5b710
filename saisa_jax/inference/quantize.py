"""int8 weights for inference, through qwix: half the bytes of bfloat16, a scale for every output channel.

Only stacked projections are quantised (decoder, per-layer projectors, vision encoder), which is nearly all of a model.
They stay int8 in memory; each layer's are converted to floating point when that layer runs. Activations, embedding,
head and norms are as they were.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from saisa_jax.checkpoints.checksums import flatten, unflatten_dict
from saisa_jax.config import ConfigError

QUANTIZATIONS = ("int8",)


class Quantized(NamedTuple):
    """Quantised parameters: int8 kernels among the others, and their scales."""

    params: Any
    scales: Any


def variables_of(params: Any) -> dict[str, Any]:
    """What a module is applied to, for plain and for quantised parameters."""
    return params._asdict() if isinstance(params, Quantized) else {"params": params}


def quantize(params: Any, kind: str = "int8") -> Quantized:
    """Weights rounded to 8 bits, symmetrically, by the largest of each output channel.

    Raises:
      ConfigError: another kind, or qwix is not installed.
    """
    if kind not in QUANTIZATIONS:
        raise ConfigError(f"quantize={kind!r} is not one of {', '.join(QUANTIZATIONS)}")
    try:
        import qwix  # pyright: ignore[reportMissingImports]  (an option)
    except ImportError as error:
        raise ConfigError("int8 inference needs qwix: pip install qwix") from error
    kernels, scales = {}, {}
    for path, leaf in flatten(params).items():
        stacked = "layers/" in path and path.endswith("/kernel") and "/depthwise/" not in path
        if stacked:
            inputs = (1, 2) if "/o_proj/" in path else (1,)  # axis 0 is the layer, the rest are outputs
            outputs = [axis for axis in range(leaf.ndim) if axis not in inputs]
            array = qwix.quantize(leaf, jnp.int8, channelwise_axes=outputs, scale_dtype=jnp.float32)
            leaf, scales[path] = array.qvalue, array.scale
        kernels[path] = leaf
    return Quantized(unflatten_dict(kernels), unflatten_dict(scales))
