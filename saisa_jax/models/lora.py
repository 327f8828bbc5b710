"""LoRA (arXiv 2106.09685): beside a frozen kernel W of a decoder layer, the product of two low-rank ones that train.

    y = x W + (alpha / rank) (x A) B        A [inputs, rank] random, B [rank, outputs] zero at first

qwix adds A and B to the block's own parameters, as `kernel_lora_a` and `kernel_lora_b` beside each `kernel`, so that
they are stacked, scanned, sharded and saved like all others. After training they are merged into the kernels.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from saisa_jax.config import ConfigError, LoraConfig

A, B = "_lora_a", "_lora_b"


def is_adapter(path: str) -> bool:
    """Whether a parameter is an A or a B."""
    return path.endswith((A, B))


def with_adapters(block: nn.Module, config: LoraConfig, methods: Collection[str]) -> nn.Module:
    """The block with A and B at `config.projections`; the block itself where there are none.

    Args:
      block: of a decoder layer.
      config: rank, alpha and where.
      methods: of the block that will be called, by name.

    Raises:
      ConfigError: qwix is not installed.
    """
    if not config.rank:
        return block
    try:
        import qwix  # pyright: ignore[reportMissingImports]  (an option)
    except ImportError as error:
        raise ConfigError("LoRA needs qwix: pip install qwix") from error
    rule = qwix.LoraRule(
        module_path="|".join(name.removeprefix("layers/") for name in config.projections),
        rank=config.rank,
        alpha=config.alpha,
        # As in Hugging Face's PEFT: uniform up to 1 / sqrt(inputs).
        lora_a_initializer=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
    )
    adapted: Any = qwix.apply_lora_to_model(block, qwix.LoraProvider([rule]), methods=methods)
    return adapted


def in_dtype(params: Any, dtype: Any) -> Any:
    """Parameters with A and B in the dtype of the activations; Linen casts the others where it uses them."""
    cast = lambda path, leaf: leaf.astype(dtype) if is_adapter(str(path[-1].key)) else leaf  # noqa: E731
    return jax.tree_util.tree_map_with_path(cast, params)


def merge_adapters(params: Any, config: LoraConfig) -> Any:
    """The parameters of the plain model that computes the same: W + (alpha / rank) A B, float32, for every pair."""
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")  # pyright: ignore[reportAssignmentType]
    for path in [path for path in flat if path.endswith(A)]:
        name = path.removesuffix(A)
        a, b, kernel = flat.pop(path), flat.pop(name + B), flat[name]
        product = jnp.einsum("lir,lro->lio", a, b, precision="highest") * (config.alpha / config.rank)
        flat[name] = kernel.astype(jnp.float32) + product.reshape(kernel.shape)
    return traverse_util.unflatten_dict(flat, sep="/")
