"""Layers that decoder, encoder and projector share: norms, projections, rotary positions, stacks of blocks.

Parameters carry logical axis names (`parallel.py` maps them to the mesh); activations are constrained by name as well.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from saisa_jax.config import ModelConfig

Params = Any


class NamedAxes(nn.LogicallyPartitioned):
    """A parameter with the logical names of its axes, and no constraint of its own.

    Where parameters live is decided once, by the shardings with which the state is created. (Linen's box also
    constrains the value whenever it is opened, which under a mesh fails on DenseGeneral: it opens kernels before giving
    them their shape.)
    """

    def unbox(self, apply_constraint: bool = True) -> Any:
        return self.value


def named(initializer: Callable[..., Any], *axes: str | None) -> Callable[..., Any]:
    """An initializer whose parameters carry the logical names `axes`."""
    return lambda *args: NamedAxes(initializer(*args), axes)


def constrain(x: Any, *axes: str | None) -> Any:
    """`x`, constrained to the sharding of its axes' logical names in the table; without a table, unchanged.

    Raises:
      ValueError: a name that the table does not know, or two that use the same axis of the mesh. Linen
        would silently replicate in both cases.
    """
    return nn.with_logical_constraint(x, axes, fallback=nn.spmd.RulesFallback.RAISE_ERROR)


_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def on_platform(platform: str) -> Iterator[None]:
    """What is traced inside is meant for `platform`, though jax's own backend is another: compiling ahead of time."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def platform() -> str:
    """What is traced now will run on it."""
    return _platform.get() or jax.default_backend()


def for_float32_product(*operands: Any) -> tuple[Any, ...]:
    """Operands of a product with `preferred_element_type=float32`.

    Accelerators accumulate products of 16-bit numbers in float32. XLA for CPUs has no such product ("Unsupported
    element type for DotThunk"), so there the operands become float32 first, which gives the same numbers.
    """
    if platform() != "cpu":
        return operands
    return tuple(jnp.asarray(operand).astype(jnp.float32) for operand in operands)


def _float32_dot_general(left: Any, right: Any, *args: Any, **kwargs: Any) -> Any:
    left, right = for_float32_product(left, right)
    return jax.lax.dot_general(left, right, *args, **{**kwargs, "preferred_element_type": jnp.float32})


def dtypes(config: ModelConfig) -> dict[str, Any]:
    """What `dense` is told of a model's numbers: those of activations, and those of parameters."""
    return {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}


def dense(
    features: int | Sequence[int],
    axes: Sequence[str | None],
    *,
    axis: int | Sequence[int] = -1,
    use_bias: bool = False,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    name: str | None = None,
    float32_output: bool = False,
    kernel_init: Callable[..., Any] | None = None,
) -> nn.DenseGeneral:
    """A projection with logical axes `axes`, one name for each dimension of its kernel."""
    features = (features,) if isinstance(features, int) else tuple(features)
    # Products of 16-bit inputs may be returned as accumulated, in float32 (the LM head).
    dot = _float32_dot_general if float32_output else None
    return nn.DenseGeneral(
        features,
        axis=axis,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=named(kernel_init or nn.initializers.lecun_normal(), *axes),
        bias_init=named(nn.initializers.zeros, *axes[-len(features) :]),
        dot_general=dot,
        name=name,
    )


def look_up(table: nn.Embed, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Embeddings of tokens, from a table that is split twice: by tokens over "tensor", by columns over "fsdp".

    Rows of the batch are split over "fsdp" as well. So each device looks up its columns for all rows of its group, and
    then columns are exchanged for rows. Otherwise XLA may replicate the embeddings over all devices, and in
    the backward pass their gradient ("involuntary full rematerialization").
    """
    tokens = constrain(tokens, "activation_lookup", "activation_length")
    columns = constrain(table(tokens), "activation_lookup", "activation_length", "embed")
    return constrain(columns, "activation_batch", "activation_length", "activation_embed")


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32."""

    epsilon: float
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        scale = self.param("scale", named(nn.initializers.ones, "norm"), (x.shape[-1],), self.param_dtype)
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(epsilon: float, param_dtype: Any, name: str | None = None) -> nn.LayerNorm:
    """The encoders' LayerNorm; float32 inside and out."""
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=jnp.float32,
        param_dtype=param_dtype,
        scale_init=named(nn.initializers.ones, "norm"),
        bias_init=named(nn.initializers.zeros, "norm"),
        use_fast_variance=False,
        name=name,
    )


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class Rotation(NamedTuple):
    """Rotary position embedding of some rows, half-split as in Hugging Face ("rotate_half")."""

    cos: Float[Array, "B S half"]
    sin: Float[Array, "B S half"]

    def where(self, rotates: Bool[Array, ""] | None) -> Rotation:
        """This rotation in a layer that rotates (None: all do), and none at all in another."""
        if rotates is None:
            return self
        return Rotation(jnp.where(rotates, self.cos, 1), jnp.where(rotates, self.sin, 0))


def rotated_layers(config: ModelConfig, layers: Sequence[int]) -> Bool[np.ndarray, " layers"] | None:
    """Which of some layers of the decoder rotate their queries and keys; None: all layers do."""
    return np.array([layer not in config.unrotated_layers for layer in layers]) if config.unrotated_layers else None


def rotation(positions: Int[Array, "B S"], config: ModelConfig) -> Rotation:
    """Angles of `positions`, in float32."""
    angles = positions[..., None].astype(jnp.float32) * rotary_frequencies(config)
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotary_frequencies(config: ModelConfig) -> Float[np.ndarray, " half"]:
    """theta ** (-2i / H), scaled as `config.rope_scaling` says, in float32."""
    # Computed once on the host, rounded where torch rounds: libraries differ in the last bit of these, which the angles
    # of far positions magnify.
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1) / (config.rope_theta ** exponents.astype(np.float64)).astype(np.float32)
    scaling = config.rope_scaling
    if scaling.kind == "none":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / np.float32(scaling.factor)
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    # Turns of each within the context first trained on. torch divides a number by a tensor as 1 / tensor * number.
    one = np.float32(1)
    wavelengths = one / frequencies * np.float32(2 * np.pi)
    turns = one / wavelengths * np.float32(scaling.original_max_length)
    kept = np.clip((turns - low) / (high - low), 0, 1)  # 1: as it is, 0: divided by the factor
    return (1 - kept) * frequencies / np.float32(scaling.factor) + kept * frequencies


def rotate_keys(k: Float[Array, "*L B K S H"], rope: Rotation) -> Float[Array, "*L B K S H"]:
    """Rotates head-major keys (of one layer, or stacked over layers) to their rows' positions."""
    return _rotate(k, rope.cos[:, None], rope.sin[:, None])


def rotate_queries(q: Float[Array, "B T N H"], rope: Rotation) -> Float[Array, "B T N H"]:
    """Rotates token-major queries to their rows' positions."""
    return _rotate(q, rope.cos[:, :, None], rope.sin[:, :, None])


def _rotate(x: Any, cos: Any, sin: Any) -> Any:
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


# --- Stacks of blocks -------------------------------------------------------------------------------------------------


def init_stack(block: nn.Module, length: int, *args: Any, method: Any = None) -> Callable[[Any], Params]:
    """An initializer of `length` copies of a block's parameters, stacked on a leading axis named `layers`."""

    def init(key: Any) -> Params:
        stacked = jax.vmap(lambda k: block.init(k, *args, method=method)["params"])(jax.random.split(key, length))
        is_box = lambda leaf: isinstance(leaf, meta.AxisMetadata)  # noqa: E731
        return jax.tree.map(lambda box: box.add_axis(0, {nn.PARTITION_NAME: "layers"}), stacked, is_leaf=is_box)

    return init


# Arrays of a layer by the names that their modules give them (`keep`). The visual tokens' are not among them: there are
# more of these than of text, and each of their arrays takes the memory of several of these.
NAMES = ("q", "gate", "up")
ATTENDED = ("attended", "logsum")  # a fused attention's own results


def _is_kernel(primitive: Any, *_: Any, **__: Any) -> bool:
    """cuDNN's attention, whose results cannot be named before its own backward pass keeps them."""
    return primitive.name == "dot_product_attention_fwd_wrapper"


def _or_attention(policy: Any) -> Any:
    """`policy`, and what a fused attention keeps: a product that is none to JAX."""
    policies = jax.checkpoint_policies
    fused = policies.save_from_both_policies(policies.save_only_these_names(*ATTENDED), _is_kernel)
    return policies.save_from_both_policies(policy, fused)


_POLICIES = {
    "full": None,  # keep nothing but the carry
    "names": _or_attention(jax.checkpoint_policies.save_only_these_names(*NAMES)),
    "dots": _or_attention(jax.checkpoint_policies.dots_saveable),
    "dots_no_batch": _or_attention(jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}


def keep(x: Any, name: str) -> Any:
    """`x`, by a name of NAMES or ATTENDED: what `remat_policy=names` keeps for the backward pass."""
    return checkpoint_name(x, name)


def scan_stack(
    body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, *, remat_policy: str, scan: bool
) -> tuple[Any, Any]:
    """`lax.scan` of a layer over stacked parameters, with rematerialisation; `scan=False` unrolls it.

    Linen's own `nn.scan` owns the stack that it runs over, so it can run neither a slice of it (`visual_layers`) nor
    the visual part of a layer alone (the image cache). Blocks are pure functions of their parameters; this is the
    plain scan over them.
    """
    body, length = rematerialised(body, remat_policy, scan), jax.tree.leaves(xs)[0].shape[0]
    return jax.lax.scan(body, carry, xs, unroll=1 if scan else length)


def rematerialised(body: Callable[..., Any], remat_policy: str, scan: bool) -> Callable[..., Any]:
    """A layer, inside a scan or not, of which the backward pass has what the policy keeps."""
    if remat_policy == "none":
        return body
    # `auto` that nobody has settled: a model that does not train.
    policy = _POLICIES["full" if remat_policy == "auto" else remat_policy]
    return jax.checkpoint(body, policy=policy, prevent_cse=not scan)


def with_scales(module: nn.Module, name: str, stack: Params) -> Params:
    """A stack as `dequantized` takes it: (int8 kernel, scale) where the module was given a scale for a kernel."""
    if not module.has_variable("scales", name):
        return stack
    return _paired(stack, module.get_variable("scales", name))


def _paired(tree: Params, scales: Params) -> Params:
    """`tree` with (leaf, scale) for the leaves that have one."""
    if not isinstance(tree, Mapping):
        return tree, scales
    return {name: _paired(leaf, scales[name]) if name in scales else leaf for name, leaf in tree.items()}


def dequantized(params: Params, dtype: Any) -> Params:
    """One layer's parameters, int8 kernels as floating point."""
    is_pair = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    restore = lambda leaf: (leaf[0] * leaf[1]).astype(dtype) if isinstance(leaf, tuple) else leaf  # noqa: E731
    return jax.tree.map(restore, params, is_leaf=is_pair)


def take_layers(stack: Params, start: int, stop: int) -> Params:
    """Layers start..stop of a stack; the stack itself if these are all."""
    return jax.tree.map(lambda x: x if (start, stop) == (0, x.shape[0]) else x[start:stop], stack)
