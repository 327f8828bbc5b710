"""What a train step takes of a device's memory, by arithmetic: it is traced, and not compiled."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from saisa_jax import flops
from saisa_jax.batch import empty_batch
from saisa_jax.chips import GIB, memory_of
from saisa_jax.config import LIGHTEST_FIRST, Groups, ModelConfig, StageConfig, Teacher
from saisa_jax.models.layers import on_platform
from saisa_jax.models.saisa import abstract_params
from saisa_jax.training.distill import abstract_own
from saisa_jax.training.optimizer import flatten, merge, split
from saisa_jax.training.step import sums_of

SURE = 0.9  # of the memory; the arithmetic is no better than that


def device_bytes(tree: Any) -> int:
    """Bytes that abstract arrays with shardings take on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def room(devices: Sequence[Any]) -> float | None:
    """Bytes that a program may use on each of some devices; None: unknown, as on a CPU.

    Of devices of several processes, all of which call this, it is the least that one of them finds.
    """
    own = [device for device in devices if device.process_index == jax.process_index()]
    found = min((memory_of(device) or 0.0 for device in own), default=0.0)
    if jax.process_count() > 1 and len({device.process_index for device in devices}) > 1:
        found = float(np.min(multihost_utils.process_allgather(np.asarray(found / GIB, np.float32)))) * GIB
    return found or None


def lightest_remat(
    model: ModelConfig,
    settings: StageConfig,
    mesh: Mesh,
    state: Any,
    loss_chunk: int,
    available: float | None,
    teacher: Teacher | None = None,
) -> tuple[str, str]:
    """The policy that computes least again among those whose step fits a device: what `remat_policy=auto` is.

    Args:
      model: the model while the stage trains it.
      settings: of the stage.
      mesh: of the run.
      state: abstract, with shardings.
      loss_chunk: `training.loss_chunk`.
      available: bytes of a device; None: unknown, and the policy is the one that keeps least.
      teacher: of the stage.

    Returns:
      The policy, and what it was chosen by, in words.
    """
    least = LIGHTEST_FIRST[-1]
    if available is None:
        return least, "the devices do not tell how much memory they have"
    for policy in LIGHTEST_FIRST:
        named = dataclasses.replace(model, remat_policy=policy)
        needed = step_bytes(named, settings, mesh, state, loss_chunk, teacher)
        if policy == least or needed <= SURE * available:
            return policy, f"about {needed / GIB:.1f} of {available / GIB:.1f} GiB a device"
    raise AssertionError  # the last one is returned


def step_bytes(
    model: ModelConfig,
    settings: StageConfig,
    mesh: Mesh,
    state: Any,
    loss_chunk: int = 0,
    teacher: Teacher | None = None,
) -> float:
    """Bytes of one device at the height of a step, to a tenth or so: state, gradients, what is kept of the
    activations for the backward pass, and what is in use of them in a layer or at the head.

    Args: as for `lightest_remat`.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = settings.batch_size // (ways * settings.accumulation)
    part = _part(model, mesh.shape["tensor"])
    width = jax.numpy.dtype(model.dtype).itemsize
    visual = settings.max_images * part.num_visual_tokens
    asking = _asking(part, settings)

    floats = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float32", sharding=x.sharding), state.trainable)
    gradients = device_bytes(floats) * (1 if settings.accumulation == 1 else 2)  # the sum so far, and the next ones
    # Scores and what softmax makes of them, forward and backward: three and a half times their size, as compiled.
    scores = 3.5 * 4 * rows * part.num_heads * asking * (settings.text_length + visual)
    layer = scores if part.attention_impl == "xla" else 0
    layer += 4 * rows * asking * part.mlp_dim * width + 3 * rows * visual * part.embed_dim * width
    # A layer's kernels, gathered in the dtype of the activations, and their gradients before they are scattered.
    layers = flatten(merge(state.trainable, state.frozen))
    kernels = sum(leaf.size for path, leaf in layers.items() if path.startswith("layers/")) / part.num_layers
    layer += (width + 4) * kernels / mesh.shape["tensor"]
    positions = min(loss_chunk or settings.text_length, settings.text_length)
    of_each = 5 if teacher else 3  # logits, what softmax makes of them, and the gradient; a teacher's have none
    logits = of_each * 4 * rows * positions * part.padded_vocab_size / mesh.shape["tensor"]
    s, platform = settings, mesh.devices.flat[0].platform
    kept = kept_bytes(part, s.groups, rows, s.text_length, s.max_images, loss_chunk, platform)
    if teacher is not None:
        taught = _part(teacher.model, mesh.shape["tensor"])
        asking = _asking(taught, settings)
        scores = 2 * 4 * rows * taught.num_heads * asking**2 if taught.attention_impl == "xla" else 0
        layer = max(layer, scores + rows * asking * (3 * taught.mlp_dim + 3 * taught.embed_dim) * width)
    return device_bytes(state) + gradients + kept + max(layer, logits)


def _asking(model: ModelConfig, settings: StageConfig) -> int:
    """Queries of a row."""
    return settings.text_length + ("queries" in model.visual_roles) * settings.max_images * model.num_visual_tokens


def _part(model: ModelConfig, tensor: int) -> ModelConfig:
    """The model that one of `tensor` devices computes: its share of heads and of the widths between products."""
    heads = model.num_heads // tensor
    kv_heads = model.num_kv_heads // tensor if model.num_kv_heads % tensor == 0 else heads
    projector = dataclasses.replace(model.projector, hidden_dim=model.projector_dim // tensor)
    return dataclasses.replace(
        model, num_heads=heads, num_kv_heads=kv_heads, mlp_dim=model.mlp_dim // tensor, projector=projector
    )


def kept_bytes(
    model: ModelConfig, groups: Groups, rows: int, text: int, images: int, loss_chunk: int = 0, platform: str = "cpu"
) -> int:
    """Bytes that all layers keep of `rows` rows of `text` tokens and `images` slots for the backward pass, under the
    model's `remat_policy`: what the loops of the forward pass stack, in the jaxpr of loss and gradients."""
    jaxpr = _gradient(model, groups, rows, text, images, loss_chunk, platform)
    forward = [scan for scan in flops.scans(jaxpr) if not scan.params["reverse"]]
    stacked = [out.aval for scan in forward for out in scan.outvars[scan.params["num_carry"] :]]
    return sum(aval.size * aval.dtype.itemsize for aval in stacked)


def traffic_bytes(
    model: ModelConfig, settings: StageConfig, mesh: Mesh, loss_chunk: int = 0, teacher: Teacher | None = None
) -> int:
    """Bytes that a device reads and writes in a step for what the state is not: operands and results of every product
    and kernel, each once, and what is kept for the backward pass twice. What stands between products is taken to be
    fused into them, so that this is the least.

    Args: as for `step_bytes`.
    """
    s, part = settings, _part(model, mesh.shape["tensor"])
    rows = s.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"] * s.accumulation)
    of_step = part, s.groups, rows, s.text_length, s.max_images, loss_chunk, mesh.devices.flat[0].platform
    if teacher is not None:
        teacher = dataclasses.replace(teacher, model=_part(teacher.model, mesh.shape["tensor"]))
    products = sum(product.bytes for product in flops.products(_gradient(*of_step, teacher)))
    return s.accumulation * (products + 2 * kept_bytes(*of_step))


@functools.lru_cache(maxsize=16)
def _gradient(
    model: ModelConfig,
    groups: Groups,
    rows: int,
    text: int,
    images: int,
    loss_chunk: int,
    platform: str,
    teacher: Teacher | None = None,
) -> Any:
    """The jaxpr of loss and gradients of `rows` rows."""
    model = _traceable(model)
    batch = empty_batch(rows, text, images, model.image_slot)
    trainable, frozen = jax.eval_shape(lambda params: split(params, groups), abstract_params(model))
    own = None
    if teacher is not None:
        teacher = dataclasses.replace(teacher, model=_traceable(teacher.model))
        own = abstract_own(teacher, frozen)
    gradient = jax.value_and_grad(sums_of(model, loss_chunk, teacher), has_aux=True)
    with nn.logical_axis_rules(()), on_platform(platform):
        return jax.make_jaxpr(gradient)(trainable, frozen, batch, own).jaxpr


def _traceable(model: ModelConfig) -> ModelConfig:
    """The model with an attention that can be traced anywhere: `flash`, which keeps what other kernels keep."""
    if model.attention_impl == "xla":
        return model
    dtype = "float32" if model.dtype == "float32" else "bfloat16"
    return dataclasses.replace(model, attention_impl="flash", dtype=dtype)
