"""Flash attention for TPUs that evaluates NAAViT's mask tile by tile: a Pallas kernel, forward and backward.

Neither the scores [B, N, T, S] nor the mask [B, T, S] ever exist. A kernel is given positions and segments, and
evaluates `legal` (`mask.py`) for one tile of keys x queries at a time. Tiles without a legal pair are neither computed
nor copied, so that a packed row costs about what its samples cost.

Tiles lie keys x queries, the transpose of the textbook: what belongs to a query (the highest score, the sum of weights)
is then a row [1, queries] that broadcasts over sublanes, and needs 4 bytes of memory, not 128 lanes.

    forward    s = k q'   p = exp(s - highest)   out' = sum of v' p / total   logsum = highest + log(total)
    backward   p = exp(s - logsum)   ds = p (v g' - sum(g out))   dv = p g   dk = ds q   dq' = k' ds

Axes: B batch, T queries, S keys, N query heads, K key/value heads, H head_dim; inside, T and S are padded to tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from saisa_jax.models.layers import keep
from saisa_jax.models.mask import MASKED, Mask, PackedPositions, legal, may_attend

LANES = 128
MAX_TILE = 512  # keys, and queries, of a tile: its float32 scores take 1 MiB of the core's 16


def flash_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], mask: Mask
) -> Float[Array, "B T N H"]:
    """Softmax attention of `q`, already scaled.

    Any T and S: they are padded to tiles of at most MAX_TILE. The output of a query without a legal key is exactly 0,
    and no gradient passes through it.

    Raises:
      ValueError: a dtype that the TPU's matrix unit does not support, or a head_dim that does not fill its sublanes.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"model.attention_impl=flash is for bfloat16 and float32, not model.dtype={q.dtype}")
    if q.shape[-1] % 8:
        legal_size = -(-q.shape[-1] // 8) * 8
        raise ValueError(
            f"model.attention_impl=flash needs a model.head_dim that is a multiple of 8, such as {legal_size}, not "
            f"{q.shape[-1]}; set model.attention_impl=xla"
        )
    length = q.shape[1]
    ids, tiles = _tiled(mask.queries, mask.keys, mask.window)
    q, k, v = _pad(q.swapaxes(1, 2), 2, tiles.queries), _pad(k, 2, tiles.keys), _pad(v, 2, tiles.keys)
    out: Any = _attention(q, k, v, ids, tiles)
    return out[:, :, :length].swapaxes(1, 2)


class _PositionPairs(NamedTuple):
    """Positions and segments: of queries as two rows, of keys as two columns."""

    queries: Int[Array, "B 2 T"]
    keys: Int[Array, "B S 2"]


class _Tiles(NamedTuple):
    """What is known before the program runs."""

    queries: int
    keys: int
    window: int | None


def _tile(length: int) -> int:
    """The tile that cuts `length` into the fewest, most even pieces."""
    pieces = -(-length // MAX_TILE)
    return -(-length // (pieces * LANES)) * LANES


def _tiled(queries: PackedPositions, keys: PackedPositions, window: int | None) -> tuple[_PositionPairs, _Tiles]:
    """Where queries and keys stand, padded to the tiles that they are cut into."""
    tiles = _Tiles(_tile(queries.positions.shape[1]), _tile(keys.positions.shape[1]), window)
    query_ids = jnp.stack([queries.positions, queries.segment_ids], axis=1)
    key_ids = jnp.stack([keys.positions, keys.segment_ids], axis=2)
    return _PositionPairs(_pad(query_ids, 2, tiles.queries), _pad(key_ids, 1, tiles.keys)), tiles


def needed_tiles(queries: PackedPositions, keys: PackedPositions, window: int | None) -> Bool[Array, "B I J"]:
    """Which tiles of queries and keys the kernel computes; the others it skips."""
    return _needed(*_tiled(queries, keys, window))


def _pad(x: Any, axis: int, multiple: int) -> Any:
    """Zeros at the end: padding has segment 0, and no query attends to it."""
    return jnp.pad(x, [(0, -x.shape[i] % multiple if i == axis else 0) for i in range(x.ndim)])


# --- Forward and backward ---------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q: Any, k: Any, v: Any, ids: _PositionPairs, tiles: _Tiles) -> Any:
    return _forward(q, k, v, ids, tiles)[0]


def _forward(q: Any, k: Any, v: Any, ids: _PositionPairs, tiles: _Tiles) -> tuple[Any, Any]:
    sweep = _sweep_queries(q, k, ids, tiles)
    of = sweep.specs
    rows = jax.ShapeDtypeStruct((*q.shape[:2], 1, q.shape[2]), jnp.float32)
    out, logsum = _call(
        functools.partial(_forward_kernel, window=tiles.window),
        sweep,
        [(ids.queries, of.query_ids), (ids.keys, of.key_ids), (q, of.q), (k, of.k), (v, of.k)],
        [(jax.ShapeDtypeStruct(q.shape, q.dtype), of.q), (rows, of.row)],
        scratch=[(1, tiles.queries), (1, tiles.queries), (q.shape[-1], tiles.queries)],
        products=2,
    )
    out, logsum = keep(out, "attended"), keep(logsum, "logsum")  # else remat runs this kernel again
    return out, (q, k, v, ids, out, logsum)


def _backward(tiles: _Tiles, saved: Any, gradient: Any) -> Any:
    q, k, v, ids, out, logsum = saved
    delta = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, :, None]
    head_dim = q.shape[-1]

    def run(kernel: Any, sweep: _Sweep, outputs: Any, scratch: Any, products: int) -> Any:
        of = sweep.specs
        inputs = [
            (ids.queries, of.query_ids), (ids.keys, of.key_ids), (q, of.q), (k, of.k), (v, of.k),
            (gradient, of.q), (logsum, of.row), (delta, of.row),
        ]  # fmt: skip
        return _call(functools.partial(kernel, window=tiles.window), sweep, inputs, outputs, scratch, products)

    by_queries, by_keys = _sweep_queries(q, k, ids, tiles), _sweep_keys(q, k, ids, tiles)
    d_q = [(jax.ShapeDtypeStruct(q.shape, q.dtype), by_queries.specs.q)]
    d_kv = [(jax.ShapeDtypeStruct(x.shape, x.dtype), by_keys.specs.k) for x in (k, v)]
    (dq,) = run(_queries_kernel, by_queries, d_q, [(head_dim, tiles.queries)], products=3)
    dk, dv = run(_keys_kernel, by_keys, d_kv, [(tiles.keys, head_dim)] * 2, products=4)
    return dq, dk, dv, None


_attention.defvjp(_forward, _backward)


# --- Kernels ----------------------------------------------------------------------------------------------------------


def _forward_kernel(step, query_ids, key_ids, q, k, v, out, logsum, highest, total, weighted, *, window):
    @pl.when(step.first)
    def _():
        highest[...] = jnp.full_like(highest, MASKED / 2)  # above MASKED: exp() of an illegal pair is always 0
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    @pl.when(step.needed)
    def _():
        scores = _scores(query_ids, key_ids, q, k, window)
        peak = jnp.maximum(highest[...], jnp.max(scores, axis=0, keepdims=True))
        weights, kept = jnp.exp(scores - peak), jnp.exp(highest[...] - peak)
        highest[...] = peak
        total[...] = kept * total[...] + jnp.sum(weights, axis=0, keepdims=True)
        weighted[...] = kept * weighted[...] + _dot(v[0, 0], weights.astype(v.dtype), (0, 0))

    @pl.when(step.last)
    def _():
        safe = jnp.where(total[...] == 0, 1.0, total[...])
        out[0, 0] = (weighted[...] / safe).T.astype(out.dtype)
        logsum[0, 0] = highest[...] + jnp.log(safe)


def _queries_kernel(step, query_ids, key_ids, q, k, v, gradient, logsum, delta, dq, total, *, window):
    @pl.when(step.first)
    def _():
        total[...] = jnp.zeros_like(total)

    @pl.when(step.needed)
    def _():
        weights = jnp.exp(_scores(query_ids, key_ids, q, k, window) - logsum[0, 0])
        d_scores = weights * (_dot(v[0, 0], gradient[0, 0], (1, 1)) - delta[0, 0])
        total[...] += _dot(k[0, 0], d_scores.astype(k.dtype), (0, 0))

    @pl.when(step.last)
    def _():
        dq[0, 0] = total[...].T.astype(dq.dtype)


def _keys_kernel(step, query_ids, key_ids, q, k, v, gradient, logsum, delta, dk, dv, k_total, v_total, *, window):
    @pl.when(step.first)
    def _():
        k_total[...] = jnp.zeros_like(k_total)
        v_total[...] = jnp.zeros_like(v_total)

    @pl.when(step.needed)
    def _():
        weights = jnp.exp(_scores(query_ids, key_ids, q, k, window) - logsum[0, 0])
        d_scores = weights * (_dot(v[0, 0], gradient[0, 0], (1, 1)) - delta[0, 0])
        v_total[...] += _dot(weights.astype(gradient.dtype), gradient[0, 0], (1, 0))
        k_total[...] += _dot(d_scores.astype(q.dtype), q[0, 0], (1, 0))

    @pl.when(step.last)
    def _():
        dk[0, 0] = k_total[...].astype(dk.dtype)
        dv[0, 0] = v_total[...].astype(dv.dtype)


def _scores(query_ids: Any, key_ids: Any, q: Any, k: Any, window: int | None) -> Any:
    """A tile of scores, keys x queries, MASKED where `legal` says so."""
    queries, keys = query_ids[0], key_ids[0]
    allowed = legal(queries[0:1], queries[1:2], keys[:, 0:1], keys[:, 1:2], window)
    return jnp.where(allowed, _dot(k[0, 0], q[0, 0], (1, 1)), MASKED)


def _dot(a: Any, b: Any, axes: tuple[int, int]) -> Any:
    """The product over one axis of each, accumulated in float32."""
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


# --- The order of the tiles -------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """Where a kernel is in the inner loop of its sweep."""

    first: Any
    last: Any
    needed: Any


class _Specs(NamedTuple):
    """Which part of an array a step has in the core's memory."""

    q: pl.BlockSpec
    row: pl.BlockSpec
    query_ids: pl.BlockSpec
    k: pl.BlockSpec
    key_ids: pl.BlockSpec


class _Sweep(NamedTuple):
    """A loop over rows, heads, outer tiles (whose results accumulate) and inner tiles."""

    grid: tuple[int, ...]
    fetched: Int[Array, "B outer inner"]  # the inner tile that is in memory at each step
    specs: _Specs


def _sweep_queries(q: Any, k: Any, ids: _PositionPairs, tiles: _Tiles) -> _Sweep:
    """All keys of a tile of queries, then the next tile of queries."""
    group = q.shape[1] // k.shape[1]
    fetched = _fetched(_needed(ids, tiles))

    def where(b: Any, n: Any, i: Any, j: Any, fetched: Any) -> tuple[Any, ...]:
        return b, n, i, jax.lax.div(n, group), fetched[b, i, j]

    return _Sweep((*q.shape[:2], *fetched.shape[1:]), fetched, _specs(where, tiles, q.shape[-1]))


def _sweep_keys(q: Any, k: Any, ids: _PositionPairs, tiles: _Tiles) -> _Sweep:
    """All queries, of all the heads that share them, of a tile of keys, then the next tile of keys."""
    group = q.shape[1] // k.shape[1]
    fetched = _fetched(_needed(ids, tiles).swapaxes(1, 2))
    outer, inner = fetched.shape[1:]

    def where(b: Any, h: Any, j: Any, step: Any, fetched: Any) -> tuple[Any, ...]:
        return b, h * group + jax.lax.div(step, inner), fetched[b, j, jax.lax.rem(step, inner)], h, j

    return _Sweep((*k.shape[:2], outer, group * inner), fetched, _specs(where, tiles, q.shape[-1]))


def _needed(ids: _PositionPairs, tiles: _Tiles) -> Bool[Array, "B I J"]:
    """Which tiles hold a legal pair."""
    queries, keys = ids
    allowed = may_attend(queries[:, 0], queries[:, 1], keys[:, :, 0], keys[:, :, 1], tiles.window)
    batch, t, s = allowed.shape
    return jnp.any(allowed.reshape(batch, t // tiles.queries, tiles.queries, s // tiles.keys, tiles.keys), axis=(2, 4))


def _fetched(needed: Bool[Array, "B outer inner"]) -> Int[Array, "B outer inner"]:
    """The inner tile to hold at each step: its own if it is needed, else the next that is, else the last that was.

    So a step is needed where it holds its own tile, and nothing is copied for the others. (Where no tile is needed the
    first one is computed: it adds nothing.)
    """
    steps = jnp.arange(needed.shape[2], dtype=jnp.int32)
    following = jax.lax.cummin(jnp.where(needed, steps, len(steps)), axis=2, reverse=True)
    last = jnp.max(jnp.where(needed, steps, 0), axis=2, keepdims=True)
    return jnp.where(following < len(steps), following, last)


def _specs(where: Callable[..., Any], tiles: _Tiles, head_dim: int) -> _Specs:
    """`where` gives (row, query head, tile of queries, key/value head, tile of keys) of a step."""

    def spec(shape: tuple[int, ...], pick: Callable[..., Any]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *step: pick(*where(*step)))

    return _Specs(
        q=spec((1, 1, tiles.queries, head_dim), lambda b, n, i, h, j: (b, n, i, 0)),
        row=spec((1, 1, 1, tiles.queries), lambda b, n, i, h, j: (b, n, 0, i)),
        query_ids=spec((1, 2, tiles.queries), lambda b, n, i, h, j: (b, 0, i)),
        k=spec((1, 1, tiles.keys, head_dim), lambda b, n, i, h, j: (b, h, j, 0)),
        key_ids=spec((1, tiles.keys, 2), lambda b, n, i, h, j: (b, j, 0)),
    )


def _call(
    kernel: Callable[..., None], sweep: _Sweep, inputs: Any, outputs: Any, scratch: Any, products: int
) -> tuple[Any, ...]:
    """Runs `kernel` over a sweep; inputs and outputs are (array or shape, spec), scratch is float32 on the core."""
    inner = sweep.fetched.shape[2]

    def run(fetched: Any, *refs: Any) -> None:
        step = pl.program_id(3)
        tile = jax.lax.rem(step, inner)
        needed = fetched[pl.program_id(0), pl.program_id(2), tile] == tile
        kernel(_Step(step == 0, step == pl.num_programs(3) - 1, needed), *refs)

    arrays, in_specs = zip(*inputs, strict=True)
    shapes, out_specs = zip(*outputs, strict=True)
    q, k = arrays[2:4]
    pairs = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    return pl.pallas_call(
        run,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=sweep.grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * pairs * q.shape[-1],
            transcendentals=pairs,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *shapes)),
        ),
    )(sweep.fetched, *arrays)
