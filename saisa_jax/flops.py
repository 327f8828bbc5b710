"""How much arithmetic a model does, counted in its own program.

The program is traced with abstract arrays, in a fraction of a second at 7B: nothing is computed, no weight is
allocated. Every matrix product and convolution of its jaxpr counts, 2 FLOPs per multiply-add; norms, softmax, rotations
and activations are left out (under 1% at 7B, 4 to 6% at the demo's size). Which part a product belongs to is said by
the names of the Flax modules around it, so that a new projector or encoder is counted without anything done here.

Attention counts in full, causal and padded positions too; `StepFlops` knows how much of it that is, and takes the legal
pairs of a step's rows alone. The last layer of llava and naavit also updates visual tokens
that nothing reads; the paper's formula counts that, and so does the jaxpr. A compiler may drop it (jax 0.12 does in
part while lowering NAAViT: 0.988 of this count at 7B).

Three conventions: "end_to_end" counts all; "decoder" leaves out the vision encoder and the head; "paper" is the
authors': the layers alone, so SAISA's projectors count (they stand in the layers) and the single one of LLaVA does not.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from rich.table import Table

from saisa_jax.batch import Batch, Slot, empty_batch
from saisa_jax.config import ConfigError, Groups, ModelConfig, Teacher
from saisa_jax.models.saisa import Saisa, abstract_params

PARTS = ("vision", "projectors", "q", "kv", "o", "attention", "mlp", "head", "other")
CONVENTIONS = ("end_to_end", "decoder", "paper")


@dataclass(frozen=True)
class Breakdown:
    """FLOPs by part; print it with rich. `other` are products under no name that is known here."""

    vision: float = 0
    projectors: float = 0
    q: float = 0
    kv: float = 0
    o: float = 0
    attention: float = 0
    mlp: float = 0
    head: float = 0
    other: float = 0

    @property
    def parts(self) -> dict[str, float]:
        return {part: getattr(self, part) for part in PARTS}

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def __rich__(self) -> Table:
        table = Table("part", "FLOPs", "share")
        for part, flops in [*self.parts.items(), ("total", self.total)]:
            table.add_row(part, f"{flops:.4g}", f"{flops / self.total:.1%}" if self.total else "")
        return table


# --- Inference -------------------------------------------------------------------------------------------------------


def prefill(config: ModelConfig, text: int, images: int = 1, convention: str = "end_to_end") -> Breakdown:
    """FLOPs of reading a prompt of one row, with logits after its last token.

    Args:
      config: the model.
      text: text tokens of the row (T); the visual ones come on top.
      images: images of the row (M).
      convention: one of CONVENTIONS.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r} is not one of {', '.join(CONVENTIONS)}")
    outside = {"end_to_end": [], "decoder": ["vision", "head"], "paper": ["vision", "head"]}[convention]
    if convention == "paper" and not config.per_layer_projectors:
        outside.append("projectors")
    return dataclasses.replace(_prefill(config, text, images), **dict.fromkeys(outside, 0))


def layer(config: ModelConfig, text: int, images: int = 1) -> Breakdown:
    """FLOPs of one decoder layer that sees the images, under Flamingo with its cross layer; arguments of `prefill`."""
    every = {"flamingo": dataclasses.replace(config.flamingo, every=1)} if config.cross_layers else {}
    return prefill(dataclasses.replace(config, num_layers=1, visual_layers=None, **every), text, images, "paper")


@functools.lru_cache(maxsize=1024)
def _prefill(config: ModelConfig, text: int, images: int) -> Breakdown:
    config = _plain(config)
    program = _trace(_read(config), _params(config), _abstract_batch(1, text, images, config.vision.image_size))
    return by_part(products(program))


def xla_prefill(config: ModelConfig, text: int, images: int = 1) -> float:
    """FLOPs of the same prefill as XLA counts them, element-wise ones included: a count that is not ours.

    The program is lowered with abstract arrays and not compiled. Layers are unrolled, because XLA counts the body of a
    loop once.
    """
    config = dataclasses.replace(config, scan_layers=False)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # other backends do not count before they compile
        lowered = jax.jit(_read(config)).lower(
            _params(config), _abstract_batch(1, text, images, config.vision.image_size)
        )
        costs = lowered.cost_analysis()
    if not costs or "flops" not in costs:
        raise RuntimeError(f"XLA counted no FLOPs on the CPU backend, only {costs!r}")
    return float(costs["flops"])


def _read(config: ModelConfig) -> Callable[[Any, Batch], Any]:
    return lambda params, batch: Saisa(config).apply({"params": params}, batch, 0, method=Saisa.prefill)


# --- Training --------------------------------------------------------------------------------------------------------


class Training(NamedTuple):
    """FLOPs of training steps by part, forward and backward; recomputation (remat) is in neither. A teacher's forward
    pass stands alone."""

    forward: Breakdown
    backward: Breakdown
    teacher: Breakdown = Breakdown()

    @property
    def total(self) -> float:
        return self.forward.total + self.backward.total + self.teacher.total


def train_step(
    config: ModelConfig, groups: Groups, rows: int, text: int, images: int = 1, teacher: Teacher | None = None
) -> float:
    """FLOPs of a forward and backward pass: the total of `training`, whose arguments it takes."""
    return training(config, groups, rows, text, images, teacher).total


@functools.lru_cache(maxsize=1024)
def training(
    config: ModelConfig, groups: Groups, rows: int, text: int, images: int = 1, teacher: Teacher | None = None
) -> Training:
    """FLOPs of a forward and backward pass; padding counts, since it is computed; recomputation (remat) does not.

    The gradient is taken of what trains alone. So what trains costs three times its forward pass, a frozen decoder
    behind trainable projectors twice (attention, whose two operands are both activations, three times), and a frozen
    encoder once. Layers alike are one loop, whose backward pass goes through all of it, wherever in it something
    trains.

    Args:
      config: the model as the stage sees it (`Config.trained_model`).
      groups: what trains.
      rows: the batch size (B), in one piece or accumulated.
      text: text tokens of a row (T), padding included.
      images: image slots of a row (M), empty ones included.
      teacher: whose logits are computed as well; it encodes no images where the student's encoder is its own.

    Raises:
      ConfigError: a parameter that no row of `groups` matches.
    """
    config = _plain(config)
    trainable, frozen = _parted(traverse_util.flatten_dict(_params(config), sep="/"), groups)

    def loss(trainable: dict[str, Any], frozen: dict[str, Any], batch: Batch) -> Any:
        params = traverse_util.unflatten_dict(frozen | trainable, sep="/")
        return jnp.sum(Saisa(config).apply({"params": params}, batch)[0])  # any loss: all logits get a gradient

    program = _trace(
        jax.value_and_grad(loss), trainable, frozen, _abstract_batch(rows, text, images, config.image_slot)
    )
    forward, backward = [], []
    for product in products(program):
        (backward if "transpose(" in product.scope else forward).append(product)
    if teacher is None:
        return Training(by_part(forward), by_part(backward))
    taught = _forward(_plain(teacher.model), rows, text, images)
    if teacher.within and not any(path.startswith("vision/") for path in trainable):
        taught = dataclasses.replace(taught, vision=0)
    return Training(by_part(forward), by_part(backward), taught)


def _forward(config: ModelConfig, rows: int, text: int, images: int) -> Breakdown:
    """FLOPs of the logits of all tokens."""
    forward = lambda params, batch: Saisa(config).apply({"params": params}, batch)[0]  # noqa: E731
    return by_part(products(_trace(forward, _params(config), _abstract_batch(rows, text, images, config.image_slot))))


def _parted(params: dict[str, Any], groups: Groups) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable, frozen), by path."""
    trainable, frozen = {}, {}
    for path, leaf in params.items():
        group = next((group for pattern, group in groups if re.fullmatch(pattern, path)), None)
        if group is None:
            raise ConfigError(f"parameter {path} matches no row of groups; end the list with ('.*', ...)")
        (frozen if group.frozen else trainable)[path] = leaf
    return trainable, frozen


class StepFlops(NamedTuple):
    """FLOPs of a train step over all devices: what it needs, and what its program executes, recomputation included; of
    both attention's in full, which is in them."""

    needed: float
    needed_attention: float
    executed: float
    executed_attention: float

    def useful(self, legal: float) -> float:
        """What is needed if that share of attention's pairs is legal (`models/pairs.py`)."""
        return self.needed - (1 - legal) * self.needed_attention

    def done(self, visited: float) -> float:
        """What is executed if attention computes that share of its tiles."""
        return self.executed - (1 - visited) * self.executed_attention


def of_step(
    config: ModelConfig,
    groups: Groups,
    rows: int,
    text: int,
    images: int,
    jaxpr: Any,
    teacher: Teacher | None = None,
) -> StepFlops:
    """FLOPs of a train step, whose own jaxpr is given; the other arguments are those of `training`."""
    needed, executed = training(config, groups, rows, text, images, teacher), by_part(products(jaxpr))
    attention = sum(passes.attention for passes in needed)
    return StepFlops(needed.total, attention, executed.total, executed.attention)


# --- Traces ----------------------------------------------------------------------------------------------------------


def _plain(config: ModelConfig) -> ModelConfig:
    """The same model without what changes how its products are made, and not which there are."""
    return dataclasses.replace(config, scan_layers=True, remat_policy="none", attention_impl="xla")


@functools.lru_cache(maxsize=64)
def _params(config: ModelConfig) -> Any:
    return abstract_params(config)


def _abstract_batch(rows: int, text: int, images: int, image: int | Slot) -> Batch:
    batch = empty_batch(rows, text, images, image)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)


def _trace(function: Callable[..., Any], *arguments: Any) -> Any:
    with nn.logical_axis_rules(()):  # of whichever mesh is in use: these rows need not divide by it
        return jax.make_jaxpr(function)(*arguments).jaxpr


# --- What a program multiplies ---------------------------------------------------------------------------------------


class Product(NamedTuple):
    """A matrix product or a convolution of a program, as often as it runs."""

    scope: str  # names of the modules and transformations around it, from the outermost
    flops: int
    bytes: int  # of its operands and its result, each once; a kernel, which may hold products, has them and no FLOPs


# Names in a product's scope, and the part that it belongs to; the first that is found counts.
_SCOPES = {
    re.compile(rf"\b{name}\b"): part
    for name, part in {
        "vision": "vision",
        "visual_proj": "projectors",
        "q_proj": "q",
        "[kv]_proj": "kv",
        "attend": "attention",
        "o_proj": "o",
        "mlp": "mlp",
        r"Saisa\.head": "head",
    }.items()
}


def part_of(scope: str) -> str:
    """The one of PARTS that the names of the modules around something say."""
    return next((part for name, part in _SCOPES.items() if name.search(scope)), "other")


def by_part(found: Iterable[Product]) -> Breakdown:
    """FLOPs of products, part by part."""
    parts: dict[str, int] = {}
    for scope, flops, _ in found:
        parts[part_of(scope)] = parts.get(part_of(scope), 0) + flops
    return Breakdown(**parts)


def count(jaxpr: Any) -> int:
    """FLOPs of all `products` of a jaxpr."""
    return sum(product.flops for product in products(jaxpr))


def products(jaxpr: Any, scope: str = "") -> Iterator[Product]:
    """Matrix products and convolutions of a jaxpr, over all devices; 2 FLOPs for a multiply-add.

    A scan's body counts once for each turn, a shard_map's once for each device, a kernel as its `cost_estimate` says,
    which in attention's holds all tiles; of a branch the dearest. A `while` loop, whose number of turns is unknown,
    counts once. (XLA's own `cost_analysis` counts the body of every loop once.)
    """
    for equation in _read_equations(jaxpr):
        name, params = equation.primitive.name, equation.params
        here = f"{scope}/{equation.source_info.name_stack}"
        if flops := _flops_of(equation):
            yield Product(here, flops, _bytes_of(equation))
            continue
        inside = [list(products(body, here)) for body in _bodies(params)]
        if name == "cond":
            inside = [max(inside, key=lambda branch: sum(product.flops for product in branch))]
        turns = _turns(name, params)
        for within, flops, moved in (product for body in inside for product in body):
            yield Product(within, turns * flops, turns * moved)


def _bytes_of(equation: Any) -> int:
    arrays = [variable.aval for variable in (*equation.invars, *equation.outvars) if hasattr(variable.aval, "dtype")]
    return sum(array.size * array.dtype.itemsize for array in arrays)


def scans(jaxpr: Any) -> Iterator[Any]:
    """The loops of a jaxpr, without those inside them."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        else:
            yield from (scan for body in _bodies(equation.params) for scan in scans(body))


def _read_equations(jaxpr: Any) -> list[Any]:
    """Equations with an effect, or whose results something reads: others are not compiled. (Under `remat_policy=names`
    the backward pass's jaxpr holds the forward kernel of attention, though its results were kept.)"""
    read, kept = set(map(id, jaxpr.outvars)), []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not read.isdisjoint(map(id, equation.outvars)):
            kept.append(equation)
            read.update(map(id, equation.invars))
    return kept[::-1]


def _flops_of(equation: Any) -> int:
    """Of one equation; 0: it is no product, but may hold some."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracting)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2 * equation.outvars[0].aval.size * kernel.size // outputs
    if name == "pallas_call":
        return params["cost_estimate"].flops
    if fused := _FUSED.get(name):
        (batch, queries, heads, size), keys = equation.invars[0].aval.shape, equation.invars[1].aval.shape[1]
        return 2 * fused * batch * heads * queries * keys * size
    return 0


# cuDNN's attention, which is no equations of JAX: products in it. Backward makes the scores again.
_FUSED = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def _turns(name: str, params: Any) -> int:
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        return params["mesh"].size
    return 1


def _bodies(params: Any) -> Iterator[Any]:
    """Jaxprs among the parameters of an equation."""
    for value in jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
        value = getattr(value, "jaxpr", value)
        if hasattr(value, "eqns"):
            yield value
