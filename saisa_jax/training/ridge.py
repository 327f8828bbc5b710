"""A student's projectors in closed form: each layer's is fitted to what the teacher's visual tokens are at that layer.

    Y_l   what enters the input norm of layer l of the teacher, at its visual tokens        [n, D]
    E     Y_0: its connector's tokens
    X     what a layer's projector is linear in                                             [n, K]
    w_l   1 / mean(Y_l^2): the norm divides by that size, so that errors count by it        [n]

    W_l   = argmin_W  sum_n w_l (X W - (Y_l - E))^2  +  ridge |W|^2

    mlp       X = gelu(fc1 Z), and V_l = E + X W_l + b_l: fc2_l = fc2 + W_l, fc1_l = fc1. The ridge leaves b_l out.
    low_rank  X = E, and V_l = E + X W_l with W_l of rank r/2: its U_l, D_l come in pairs, as u = silu(u) - silu(-u).

So a fit departs from a copy of the connector as far as the pictures say, and is the copy where they say nothing. Sums
are taken over batches of the stage's own data and over all hosts: of a batch in float32 at the highest precision, over
batches in float64. A host solves one layer at a time.

Axes: B batch, V visual tokens, n = B * V, C vision width, K what is fitted on, D embed, L layers that see the picture.
"""

from __future__ import annotations

import functools
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saisa_jax import parallel
from saisa_jax.batch import Batch
from saisa_jax.checkpoints import copy_sidecar, is_model, load_model, local_model, save_model
from saisa_jax.config import Config, ConfigError, ModelConfig
from saisa_jax.data.pipeline import StageData
from saisa_jax.models.layers import ACTIVATIONS
from saisa_jax.models.saisa import Saisa, share_to_per_layer
from saisa_jax.training import processes
from saisa_jax.training.setup import setup_stage
from saisa_jax.training.start import check_tokenizer, copy_of_start, fits_start
from saisa_jax.training.state import param_shardings

Params = Any
HIGHEST = jax.lax.Precision.HIGHEST
ROUNDING = 1e-6  # of a batch's sums


class FitStopped(Exception):
    """It was asked to stop; nothing of it is kept."""


class Moments(NamedTuple):
    """Sums over visual tokens, weighted by w_l: all that a fit needs. R = Y - E."""

    xx: Any  # [L, K, K]
    xr: Any  # [L, K, D]
    x: Any  # [L, K]
    r: Any  # [L, D]
    one: Any  # [L]
    rr: Any  # [L]
    yy: Any  # [L]
    tokens: Any  # [], not weighted


class Fit(NamedTuple):
    """A layer's projector, and how far it is from the teacher: sqrt(sum w error^2 / sum w Y^2)."""

    params: Params  # what differs from a copy
    copied: float  # the connector's
    fitted: float


# --- The start of a run -----------------------------------------------------------------------------------------------


def save_fit(
    config: Config,
    workdir: epath.Path,
    tokenizer: Any,
    data: Mapping[str, StageData],
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Makes the student that a run starts from, in its workdir, where it stays; where the run has no such start or has
    begun, nothing.

    Raises:
      ConfigError: the teacher's visual tokens are not finite or all alike, there are none, or it has another tokenizer.
      FitStopped: it was asked to stop.
    """
    start = copy_of_start(workdir)
    if not fits_start(config) or is_model(start) or is_model(local_model(workdir, "finetune")):
        return
    path, stage = config.distill.teacher, data["finetune"]
    setup = setup_stage(config, "finetune", stage.steps)
    assert setup.teacher is not None
    model, teacher, mesh, rules = config.model_for("finetune"), setup.teacher.model, setup.mesh, setup.rules
    params, _, trained_with, _ = load_model(path, sharding=param_shardings(teacher, mesh, rules))
    check_tokenizer(config, trained_with, tokenizer, path)
    began = time.monotonic()
    with parallel.use(mesh, rules):
        moments = gather(config, teacher, params, stage, mesh, stopped)
        tokens = int(np.asarray(moments.tokens))
        _tell_of_few(config, tokens, moments.xx.shape[1])
        fits = [
            fit(config, layer, part) for layer, part in zip(model.visible_layers, _layers(moments, mesh), strict=True)
        ]
        del moments
        params = _student(model, params, fits, config.seed, param_shardings(model, mesh, rules))
    if processes.is_first():
        print(f"fitted to {tokens:,} visual tokens of {path} in {time.monotonic() - began:.0f} s", file=sys.stderr)
        for layer, found in zip(model.visible_layers, fits, strict=True):
            print(f"layer {layer}: they are missed by {found.fitted:.1%} of their size, as a copy of the connector by "
                  f"{found.copied:.1%}", file=sys.stderr, flush=True)  # fmt: skip
    errors = {name: [getattr(found, name) for found in fits] for name in ("copied", "fitted")}
    metadata = {"stage": "finetune", "start": path, "seed": config.seed, "alignment": model.alignment}
    metadata |= {"fit": {"layers": list(model.visible_layers), "tokens": tokens, **errors}}
    save_model(start, params, config, tokenizer, metadata, copy_sidecar(path))


def _tell_of_few(config: Config, tokens: int, width: int) -> None:
    """Raises ConfigError without a picture; warns of fewer tokens than unknowns."""
    if not tokens:
        raise ConfigError(
            f"distill.start=ridge has read {config.distill.batches} batches of finetune.sources without a picture: "
            "name sources with pictures, raise --config.distill.batches, or set --config.distill.start=copy"
        )
    if tokens < 2 * width:
        logging.warning(
            "projectors of %d inputs are fitted to %s visual tokens alone; where these say nothing, they stay as the "
            "teacher's connector (--config.distill.ridge=%g). More: --config.distill.batches, now %d, or more steps",
            width, f"{tokens:,}", config.distill.ridge, config.distill.batches,
        )  # fmt: skip


def _student(model: ModelConfig, params: Params, fits: list[Fit], seed: int, shardings: Params) -> Params:
    """The teacher's parameters as the student's, with the fitted projectors."""
    fitted = jax.tree.map(lambda *layers: np.stack(layers), *(found.params for found in fits))
    added = model.projector.kind == "mlp"
    places = shardings["layers"]["visual_proj"]
    fitted = jax.tree.map(
        lambda leaf, place: jax.make_array_from_callback(leaf.shape, place, lambda index: leaf[index]),
        fitted,
        {name: places[name] for name in fitted},
    )

    def convert(params: Params, fitted: Params) -> Params:
        params = share_to_per_layer(params, model, seed)
        projectors = params["layers"]["visual_proj"]
        changed = jax.tree.map(jnp.add, projectors["fc2"], fitted["fc2"]) if added else None
        projectors = {**projectors, **({"fc2": changed} if added else fitted)}
        return {**params, "layers": {**params["layers"], "visual_proj": projectors}}

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")  # the connector's
        return jax.jit(convert, out_shardings=shardings, donate_argnums=0)(params, fitted)


# --- Sums over visual tokens ------------------------------------------------------------------------------------------


def gather(
    config: Config, teacher: ModelConfig, params: Params, data: StageData, mesh: Mesh, stopped: Callable[[], bool]
) -> Moments:
    """Sums over the stage's first batches, float64, on the mesh.

    Raises:
      ConfigError: the teacher's visual tokens are not finite.
      FitStopped: it was asked to stop. (Several processes read on: none may leave the others.)
    """
    student, rows = config.model_for("finetune"), config.finetune.batch_size
    count = min(config.distill.batches, data.steps)
    sums, batches = None, data.batches(parallel.own_rows(mesh, rows))
    try:
        for step in range(count):
            if stopped() and jax.process_count() == 1:
                raise FitStopped
            host = parallel.together(lambda: next(batches))
            found = sums_of_batch(teacher, student, mesh, params, parallel.to_device(host.batch, mesh, rows))
            bad = np.flatnonzero(~np.isfinite(np.asarray(found.yy)))
            if len(bad):
                layer = student.visible_layers[bad[0]]
                names = [name for row in host.sample_ids for name in row]
                raise ConfigError(
                    f"--config.distill.teacher={config.distill.teacher} gives visual tokens that are not finite: those "
                    f"that enter layer {layer}, of a batch that holds {', '.join(names[:8])}. Its weights are damaged, "
                    f"or --config.model.dtype={teacher.dtype} is too narrow for it"
                )
            with jax.enable_x64(True):
                sums = add_sums(sums, found)
            logging.log_every_n_seconds(logging.INFO, "fit: batch %d of %d", 30, step + 1, count)
    finally:
        batches.close()
    assert sums is not None
    return sums


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def sums_of_batch(teacher: ModelConfig, student: ModelConfig, mesh: Mesh, params: Params, batch: Batch) -> Moments:
    """Sums over a batch's visual tokens, float32, split over the mesh."""
    variables = {"params": params}
    features = Saisa(teacher).apply(variables, batch["images"], method=Saisa.encode_images)
    _, aux = Saisa(teacher).apply(variables, batch, features, ("hidden",), method=Saisa.hidden)
    flat = lambda x: x.reshape(-1, x.shape[-1]).astype(jnp.float32)  # noqa: E731
    states, features = aux["visual_hidden"], flat(features)
    connector = flat(states[0])
    x = fitted_on(student, params["visual_proj"], features, connector)
    slots = jnp.asarray(batch["image_segment_ids"])
    held = jnp.repeat(slots > 0, teacher.num_visual_tokens, axis=1).reshape(-1)

    def of_layer(y: Any) -> Moments:
        y = flat(y)
        size = jnp.mean(jnp.square(y), axis=-1)
        w = jnp.where(held, 1 / (size + teacher.norm_eps), 0.0)
        y, r = (jnp.where(held[:, None], rows, 0.0) for rows in (y, y - connector))
        weighted = x * w[:, None]
        sums = functools.partial(jnp.einsum, precision=HIGHEST)
        return Moments(
            xx=_split(sums("nk,nj->kj", weighted, x), mesh),
            xr=_split(sums("nk,nd->kd", weighted, r), mesh),
            x=jnp.sum(weighted, axis=0),
            r=sums("n,nd->d", w, r),
            one=jnp.sum(w),
            rr=jnp.sum(w[:, None] * jnp.square(r)),
            yy=jnp.sum(w[:, None] * jnp.square(y)),
            tokens=jnp.zeros(()),
        )

    x = jnp.where(held[:, None], x, 0.0)
    return jax.lax.map(of_layer, states[np.asarray(student.visible_layers)])._replace(tokens=jnp.sum(held))


def fitted_on(student: ModelConfig, connector: Params, features: Any, tokens: Any) -> Any:
    """X [n, K] of features [n, C] and the connector's tokens [n, D], float32."""
    if student.projector.kind == "low_rank":
        return tokens
    fc1 = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), connector["fc1"])
    return ACTIVATIONS["gelu"](jnp.matmul(features, fc1["kernel"], precision=HIGHEST) + fc1["bias"])


def _split(x: Any, mesh: Mesh) -> Any:
    """A layer's square of sums, its rows over the devices where they divide: a host fetches one layer at a time."""
    ways = mesh.shape["fsdp"]
    spec = PartitionSpec("fsdp" if x.shape[0] % ways == 0 else None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


@functools.partial(jax.jit, donate_argnums=0)
def add_sums(sums: Moments | None, found: Moments) -> Moments:
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), found)
    return wide if sums is None else jax.tree.map(jnp.add, sums, wide)


def _layers(moments: Moments, mesh: Mesh) -> Any:
    """Each layer's sums, float64, in every process."""
    whole = parallel.replicated(mesh)
    part = jax.jit(
        lambda moments, layer: jax.tree.map(lambda x: x[layer] if x.ndim else x, moments), out_shardings=whole
    )
    for layer in range(len(moments.one)):
        with jax.enable_x64(True):
            sums = jax.tree.map(np.asarray, part(moments, layer))
        yield sums


# --- A layer's projector ----------------------------------------------------------------------------------------------


def fit(config: Config, layer: int, sums: Moments) -> Fit:
    """A layer's projector of its sums, in float64.

    Raises:
      ConfigError: what is fitted on is the same for all visual tokens.
    """
    projector = config.model.projector
    solve = _mlp if projector.kind == "mlp" else functools.partial(_low_rank, rank=projector.rank)
    try:
        params, weights, bias = solve(sums, config.distill.ridge)
    except np.linalg.LinAlgError as error:
        raise ConfigError(
            f"distill.start=ridge: the projector of layer {layer} cannot be fitted ({error}): the visual tokens of all "
            "pictures are alike. Read more of them (--config.distill.batches), or set --config.distill.start=copy"
        ) from error
    error = sums.rr - 2 * (np.sum(weights * sums.xr) + bias @ sums.r)
    error += np.sum(weights * (sums.xx @ weights)) + 2 * sums.x @ weights @ bias + sums.one * bias @ bias
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    return Fit(params, math.sqrt(sums.rr / sums.yy), math.sqrt(max(error, 0.0) / sums.yy))


def _mlp(sums: Moments, ridge: float) -> tuple[Params, np.ndarray, np.ndarray]:
    """What is added to fc2: kernel and bias."""
    centred = sums.xx - np.outer(sums.x, sums.x) / sums.one
    if np.trace(centred) < ROUNDING * np.trace(sums.xx):
        raise np.linalg.LinAlgError("nothing varies")
    weights = _solve(centred, sums.xr - np.outer(sums.x, sums.r) / sums.one, ridge)
    bias = (sums.r - sums.x @ weights) / sums.one
    return {"fc2": {"kernel": weights, "bias": bias}}, weights, bias


def _low_rank(sums: Moments, ridge: float, rank: int) -> tuple[Params, np.ndarray, np.ndarray]:
    """Reduced-rank regression: W = B V V^T, where V are the leading right singular vectors of what B explains."""
    full = _solve(sums.xx, sums.xr, ridge)
    _, vectors = np.linalg.eigh(sums.xr.T @ full)
    pairs = min(rank // 2, vectors.shape[1])
    directions = vectors[:, ::-1][:, :pairs]
    down = full @ directions
    # u = x down: of size 1 on average, where silu bends, so that each half of a pair can go its own way in training.
    size = np.sqrt(np.maximum(np.einsum("kr,kj,jr->r", down, sums.xx, down, optimize=True) / sums.one, 1e-30))
    down, up = down / size, (directions * size).T
    left = rank - 2 * pairs  # no pair: they read what the first one reads, and add nothing yet
    kernels = {
        "down": np.concatenate([down, -down, np.repeat(down[:, :1], left, axis=1)], axis=1),
        "up": np.concatenate([up, -up, np.zeros((left, up.shape[1]))]),
    }
    return {name: {"kernel": kernel} for name, kernel in kernels.items()}, down @ up, np.zeros(up.shape[1])


def _solve(xx: np.ndarray, xr: np.ndarray, ridge: float) -> np.ndarray:
    """(xx + lambda)^-1 xr; lambda is `ridge` times the mean of the diagonal."""
    return np.linalg.solve(xx + ridge * np.trace(xx) / len(xx) * np.eye(len(xx)), xr)
