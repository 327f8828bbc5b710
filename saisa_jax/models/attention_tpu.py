"""Flash attention for TPUs that evaluates NAAViT's mask tile by tile: a Pallas kernel, forward and backward.

Neither the scores [B, N, T, S] nor the mask [B, T, S] ever exist. A kernel is given positions and segments, and
evaluates `legal` (`mask.py`) for one tile of keys x queries at a time. A kernel goes through a list of the tiles that
hold a legal pair, so that a packed row costs about what its samples cost. The backward pass goes through it once: the
gradients of a head's queries stay in the core's memory until all keys have added to them.

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
MAX_QUERIES, MAX_KEYS = 256, 512  # of a tile; docs/planning.md counts what others would cost
MAX_SUMS = 2**23  # bytes of queries' gradients at a time: sums in float32, and two buffers of what is written


def flash_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], mask: Mask
) -> Float[Array, "B T N H"]:
    """Softmax attention of `q`, already scaled.

    Any T and S: they are padded to tiles. The output of a query without a legal key is exactly 0,
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


def _tile(length: int, most: int) -> int:
    """The tile, of `most` at most, that cuts `length` into the fewest, most even pieces."""
    pieces = -(-length // most)
    return -(-length // (pieces * LANES)) * LANES


def _tiled(queries: PackedPositions, keys: PackedPositions, window: int | None) -> tuple[_PositionPairs, _Tiles]:
    """Where queries and keys stand, padded to the tiles that they are cut into."""
    lengths = queries.positions.shape[1], keys.positions.shape[1]
    tiles = _Tiles(_tile(lengths[0], MAX_QUERIES), _tile(lengths[1], MAX_KEYS), window)
    query_ids = jnp.stack([queries.positions, queries.segment_ids], axis=1)
    key_ids = jnp.stack([keys.positions, keys.segment_ids], axis=2)
    return _PositionPairs(_pad(query_ids, 2, tiles.queries), _pad(key_ids, 1, tiles.keys)), tiles


def needed_tiles(queries: PackedPositions, keys: PackedPositions, window: int | None) -> Bool[Array, "B I J"]:
    """Which tiles of queries and keys hold a legal pair: the kernels visit no others."""
    return _needed(*_tiled(queries, keys, window))


def _pad(x: Any, axis: int, multiple: int) -> Any:
    """Zeros at the end: padding has segment 0, and no query attends to it."""
    return jnp.pad(x, [(0, -x.shape[i] % multiple if i == axis else 0) for i in range(x.ndim)])


# --- Forward and backward ---------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q: Any, k: Any, v: Any, ids: _PositionPairs, tiles: _Tiles) -> Any:
    return _forward(q, k, v, ids, tiles)[0]


def _forward(q: Any, k: Any, v: Any, ids: _PositionPairs, tiles: _Tiles) -> tuple[Any, Any]:
    """For each head and tile of queries, all of its keys."""
    group = q.shape[1] // k.shape[1]
    of = _specs(lambda b, n, turn, i, j: (b, n, i, jax.lax.div(n, group), j), 1, tiles, q.shape[-1])
    logsums = jax.ShapeDtypeStruct((*q.shape[:2], 1, q.shape[2]), jnp.float32)
    out, logsum = _call(
        functools.partial(_forward_kernel, window=tiles.window),
        (*q.shape[:2], 1),
        _visits(_needed(ids, tiles)),
        [(ids.queries, of.query_ids), (ids.keys, of.key_ids), (q, of.q), (k, of.k), (v, of.k)],
        [(jax.ShapeDtypeStruct(q.shape, q.dtype), of.q), (logsums, of.row)],
        scratch=[(1, tiles.queries), (1, tiles.queries), (q.shape[-1], tiles.queries)],
        products=2,
    )
    out, logsum = keep(out, "attended"), keep(logsum, "logsum")  # else remat runs this kernel again
    return out, (q, k, v, ids, out, logsum)


def _backward(tiles: _Tiles, saved: Any, gradient: Any) -> Any:
    """In one go, unless the gradients of the queries that share a head of keys are too large for the core's memory."""
    q, k, v, ids, out, logsum = saved
    delta = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, :, None]
    numbers = (q.shape[1] // k.shape[1]) * tiles.queries * -(-q.shape[-1] // LANES) * LANES  # of a tile
    length = max(MAX_SUMS // (numbers * (4 + 2 * q.dtype.itemsize)), 1) * tiles.queries
    dtype = k.dtype if length >= q.shape[2] else jnp.float32  # of what is added up here
    parts = []
    for start in range(0, q.shape[2], length):
        cut = functools.partial(jax.lax.slice_in_dim, start_index=start, limit_index=min(start + length, q.shape[2]))
        own = _PositionPairs(cut(ids.queries, axis=2), ids.keys)
        of_queries = cut(q, axis=2), cut(gradient, axis=2), cut(logsum, axis=3), cut(delta, axis=3)
        parts.append(_backward_of(*of_queries, k, v, own, tiles, dtype))
    dq, dk, dv = zip(*parts, strict=True)
    dk, dv = (functools.reduce(jnp.add, of_parts).astype(k.dtype) for of_parts in (dk, dv))
    return jnp.concatenate(dq, axis=2), dk, dv, None


def _backward_of(
    q: Any, gradient: Any, logsum: Any, delta: Any, k: Any, v: Any, ids: _PositionPairs, tiles: _Tiles, dtype: Any
) -> tuple[Any, ...]:
    """For each head of keys and tile of keys, all of its queries, of all the heads that share it."""
    (batch, heads, length, head_dim), kv_heads = q.shape, k.shape[1]
    group = heads // kv_heads
    of = _specs(lambda b, h, turn, j, i: (b, h * group + turn, i, h, j), group, tiles, head_dim)
    whole = pl.BlockSpec((1, group, length, head_dim), lambda b, h, *_: (b, h, 0, 0))
    return _call(
        functools.partial(_backward_kernel, window=tiles.window),
        (batch, kv_heads, group),
        _visits(_needed(ids, tiles).swapaxes(1, 2)),
        [
            (ids.queries, of.query_ids), (ids.keys, of.key_ids), (q, of.q), (k, of.k), (v, of.k),
            (gradient, of.q), (logsum, of.row), (delta, of.row),
        ],
        [(jax.ShapeDtypeStruct(q.shape, q.dtype), whole), *[(jax.ShapeDtypeStruct(k.shape, dtype), of.k)] * 2],
        scratch=[(group, length // tiles.queries, head_dim, tiles.queries), *[(tiles.keys, head_dim)] * 2],
        products=5,
    )  # fmt: skip


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


def _backward_kernel(
    step, query_ids, key_ids, q, k, v, gradient, logsum, delta, dq, dk, dv, q_total, k_total, v_total, *, window
):
    @pl.when(step.starts)
    def _():
        q_total[...] = jnp.zeros_like(q_total)

    @pl.when(step.first)
    def _():
        k_total[...] = jnp.zeros_like(k_total)
        v_total[...] = jnp.zeros_like(v_total)

    @pl.when(step.needed)
    def _():
        weights = jnp.exp(_scores(query_ids, key_ids, q, k, window) - logsum[0, 0])
        d_scores = (weights * (_dot(v[0, 0], gradient[0, 0], (1, 1)) - delta[0, 0])).astype(q.dtype)
        v_total[...] += _dot(weights.astype(gradient.dtype), gradient[0, 0], (1, 0))
        k_total[...] += _dot(d_scores, q[0, 0], (1, 0))
        q_total[step.turn, step.inner] += _dot(k[0, 0], d_scores, (0, 0))

    @pl.when(step.last)
    def _():
        dk[0, 0] = k_total[...].astype(dk.dtype)
        dv[0, 0] = v_total[...].astype(dv.dtype)

    @pl.when(step.ends)
    def _():
        heads, tiles, _, width = q_total.shape

        def write(at: Any, _: None) -> None:
            head, tile = jax.lax.div(at, tiles), jax.lax.rem(at, tiles)
            dq[0, head, pl.ds(pl.multiple_of(tile * width, width), width)] = q_total[head, tile].T.astype(dq.dtype)

        jax.lax.fori_loop(0, heads * tiles, write, None)


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


class _Visits(NamedTuple):
    """The tiles that a kernel goes through: inner ones of the first outer tile, whose result accumulates, and so on."""

    outer: Int[Array, "B steps"]
    inner: Int[Array, "B steps"]
    count: Int[Array, " B"]  # rows differ; after its own, a row stays at the last one


class _Step(NamedTuple):
    """Where a kernel is among the visits of a head."""

    turn: Any  # which of the heads of queries that share the tile's head of keys
    inner: Any  # the inner tile
    needed: Any  # not past the row's own visits
    first: Any  # of its outer tile
    last: Any
    starts: Any  # the head
    ends: Any


class _Specs(NamedTuple):
    """Which part of an array a step has in the core's memory."""

    q: pl.BlockSpec
    row: pl.BlockSpec
    query_ids: pl.BlockSpec
    k: pl.BlockSpec
    key_ids: pl.BlockSpec


def _needed(ids: _PositionPairs, tiles: _Tiles) -> Bool[Array, "B I J"]:
    """Which tiles hold a legal pair."""
    queries, keys = ids
    allowed = may_attend(queries[:, 0], queries[:, 1], keys[:, :, 0], keys[:, :, 1], tiles.window)
    batch, t, s = allowed.shape
    return jnp.any(allowed.reshape(batch, t // tiles.queries, tiles.queries, s // tiles.keys, tiles.keys), axis=(2, 4))


def _visits(needed: Bool[Array, "B outer inner"]) -> _Visits:
    """Those that are needed; of an outer tile of which none is, the first, since its result is written: it is 0."""
    batch, _, inner = needed.shape
    needed = needed.at[:, :, 0].set(needed[:, :, 0] | ~jnp.any(needed, axis=2)).reshape(batch, -1)
    count = jnp.sum(needed, axis=1, dtype=jnp.int32)
    steps = jnp.minimum(jnp.arange(needed.shape[1]), count[:, None] - 1)
    tile = jnp.take_along_axis(jnp.argsort(~needed, axis=1, stable=True), steps, axis=1).astype(jnp.int32)
    return _Visits(tile // inner, tile % inner, count)


def _specs(where: Callable[..., Any], turns: int, tiles: _Tiles, head_dim: int) -> _Specs:
    """`where` makes of (row, head, turn, outer tile, inner tile) the (row, head of queries, tile of queries, head of
    keys, tile of keys) of a step; each visit has so many turns."""

    def spec(shape: tuple[int, ...], pick: Callable[..., Any]) -> pl.BlockSpec:
        def at(b: Any, head: Any, step: Any, outer: Any, inner: Any, count: Any) -> Any:
            visit = jax.lax.div(step, turns)
            return pick(*where(b, head, jax.lax.rem(step, turns), outer[b, visit], inner[b, visit]))

        return pl.BlockSpec(shape, at)

    return _Specs(
        q=spec((1, 1, tiles.queries, head_dim), lambda b, n, i, h, j: (b, n, i, 0)),
        row=spec((1, 1, 1, tiles.queries), lambda b, n, i, h, j: (b, n, 0, i)),
        query_ids=spec((1, 2, tiles.queries), lambda b, n, i, h, j: (b, 0, i)),
        k=spec((1, 1, tiles.keys, head_dim), lambda b, n, i, h, j: (b, h, j, 0)),
        key_ids=spec((1, tiles.keys, 2), lambda b, n, i, h, j: (b, j, 0)),
    )


def _call(
    kernel: Callable[..., None],
    rows_heads_turns: tuple[int, int, int],
    visits: _Visits,
    inputs: Any,
    outputs: Any,
    scratch: Any,
    products: int,
) -> tuple[Any, ...]:
    """Runs `kernel` over rows, heads and visits, several turns each.

    Args:
      inputs, outputs: (array or shape, spec).
      scratch: shapes, float32, on the core.
      products: of a tile.
    """
    rows, heads, turns = rows_heads_turns

    def run(outer: Any, inner: Any, count: Any, *refs: Any) -> None:
        b, at = pl.program_id(0), pl.program_id(2)
        visit, turn = jax.lax.div(at, turns), jax.lax.rem(at, turns)
        needed, final = visit < count[b], visit + 1 >= count[b]
        here, before = outer[b, visit], outer[b, jnp.maximum(visit - 1, 0)]
        after = outer[b, jnp.minimum(visit + 1, outer.shape[1] - 1)]
        step = _Step(
            turn=turn,
            inner=inner[b, visit],
            needed=needed,
            first=(turn == 0) & ((visit == 0) | (here != before)),
            last=(turn == turns - 1) & needed & (final | (here != after)),
            starts=at == 0,
            ends=at == pl.num_programs(2) - 1,
        )
        kernel(step, *refs)

    arrays, in_specs = zip(*inputs, strict=True)
    shapes, out_specs = zip(*outputs, strict=True)
    q, k = arrays[2:4]
    pairs = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    return pl.pallas_call(
        run,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(rows, heads, jnp.max(visits.count) * turns),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(  # as if all tiles were visited: which are is known when it runs
            flops=2 * products * pairs * q.shape[-1],
            transcendentals=pairs,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *shapes)),
        ),
    )(*visits, *arrays)
