"""`python -m saisa_jax bench peers`: SAISA and LLaVA of this program beside the same models in PyTorch.

All have the same weights and shapes, the same number of threads, and alternate in one run; before anything is timed
their outputs are compared. Features of the picture are handed in, so that no vision encoder is part of it:

    prefill   a first question about a picture, up to the logits after its last token
    second    another question about the same picture, whose keys and values are kept (not under LLaVA)
    decode    one more token, keys and values of the picture and of the text before it in a cache
    train     a step of stage 2: forward, backward, clipping and AdamW

The peers (`in_torch/peer.py`) are SAISA as this program computes it, SAISA as its authors' program does, and LLaVA, run
by eager PyTorch and through `torch.compile`. On a machine that is busy with other things nothing is concluded.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from saisa_jax import flops, parallel
from saisa_jax.batch import Batch
from saisa_jax.bench.sizes import SIZES, Size, features_of, make_config, rows_of
from saisa_jax.bench.times import Timed, Watch, in_turns
from saisa_jax.config import Config, ConfigError
from saisa_jax.errors import UserError
from saisa_jax.inference.generate import Generator, ImageSlots
from saisa_jax.models.saisa import Saisa, init_params
from saisa_jax.training.setup import setup_stage
from saisa_jax.training.state import create_state
from saisa_jax.training.step import make_train_step

STAGE = "finetune"
OURS = "this program"
MEASURES = ("prefill", "second", "decode", "train")
RUNTIMES = ("eager", "compile")  # of PyTorch
TOKENS = 8  # that a call of `decode` reads, one after the other
# Largest difference of two outputs that may be called equal, as a share of the largest output.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.1}

Calls = dict[str, Callable[[], Any]]


class DisagreeError(UserError):
    """Two programs that should compute the same do not."""


class Case(NamedTuple):
    """What is measured together."""

    size: str
    rows: int
    dtype: str


@dataclass(frozen=True)
class Program:
    """One model in one runtime: what each measure calls, and what it would answer, for comparison."""

    name: str
    alignment: str
    calls: Calls
    answers: Calls


class Found(NamedTuple):
    """One measure of one case."""

    case: Case
    measure: str
    timed: dict[str, Timed]  # by "ALIGNMENT, PROGRAM"
    differences: dict[str, float]  # of `compare`
    watch: Watch  # over the times


# --- this program -----------------------------------------------------------------------------------------------------


def ours(
    size: Size, alignment: str, case: Case, measures: Sequence[str], attention: str
) -> tuple[Program, Config, Any]:
    """This program's SAISA or LLaVA; also its configuration, and the float32 parameters that the peers get."""
    config = make_config(size, alignment, case.rows, case.dtype, attention)
    model = config.model_for(STAGE)
    start = init_params(model, jax.random.key(0))
    batch = rows_of(size, model, case.rows)
    features = jnp.asarray(features_of(size, case.rows), model.dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(model.dtype), start)
    generator = Generator(model, [])
    asked = cast(Batch, {name: jnp.asarray(x) for name, x in batch.items() if name != "images"})
    caches = generator.caches_images

    def ask(images: ImageSlots | None) -> Any:
        held = asked if caches else cast(Batch, {**asked, "images": features[:, None]})
        return generator.prefill(params, held, TOKENS, images)

    def encode() -> ImageSlots | None:
        if not caches:
            return None
        slots = np.arange(case.rows, dtype=np.int32)[:, None]
        return ImageSlots(tuple(generator.encode(params, features)), slots)

    calls: Calls = {"prefill": lambda: ask(encode())[0]}
    answers: Calls = {"prefill": calls["prefill"]}
    if caches and "second" in measures:
        kept = encode()
        calls["second"] = answers["second"] = lambda: ask(kept)[0]
    if "decode" in measures:
        calls["decode"], answers["decode"] = _our_decoding(generator, params, ask(encode()))
    if "train" in measures:
        calls["train"], answers["train"] = _our_training(config, start, batch, features)
    return Program(OURS, alignment, _only(calls, measures), _only(answers, measures)), config, start


def _our_decoding(generator: Generator, params: Any, prefilled: Any) -> tuple[Any, Any]:
    """TOKENS steps from the end of the prompt, and the logits after the first of them."""
    _, cache, positions = prefilled
    token = np.zeros(positions.shape, np.int32)
    # Each step uses the cache up: the buffers go on to the next, and what says how much of them is used is put back.
    small = jax.device_get(cache._replace(k=None, v=None, visual=None))
    held = {"cache": jax.tree.map(jnp.copy, cache)}

    def decode() -> Any:
        cache = held["cache"]._replace(positions=small.positions, segment_ids=small.segment_ids, length=small.length)
        chosen = None
        for number in range(TOKENS):
            chosen, cache = generator.step(params, token, positions + number, cache, number)
        held["cache"] = cache
        return chosen

    logits = jax.jit(lambda *args: generator.apply(*args, method=Saisa.decode)[0])
    return decode, lambda: logits(params, token, positions, cache)


def _our_training(config: Config, params: Any, batch: Batch, features: Any) -> tuple[Any, Any]:
    """A step, and the loss of the next one."""
    stage = setup_stage(config, STAGE, steps=1000)
    with parallel.use(stage.mesh, stage.rules):
        state = create_state(lambda params: params, params, stage.settings.groups, stage.optimizer, stage.shardings)
        rows = parallel.to_device(cast(Batch, {**batch, "images": np.asarray(features)[:, None]}), stage.mesh)
    train_step = make_train_step(stage.model, stage.optimizer, stage.shardings, loss_chunk=config.training.loss_chunk)
    held: dict[str, Any] = {"state": state}

    def step() -> Any:
        with parallel.use(stage.mesh, stage.rules):
            held["state"], metrics = train_step(held["state"], rows)
        return jax.block_until_ready((held["state"], metrics))[1]["loss"]

    return step, step


def _only(calls: Calls, measures: Sequence[str]) -> Calls:
    return {name: call for name, call in calls.items() if name in measures}


# --- FLOPs that a measure needs ---------------------------------------------------------------------------------------


def needed(config: Config, measure: str) -> float:
    """Of one call: products alone, without the encoder; of `decode` of one token."""
    model, settings = config.trained_model(STAGE), config.stage(STAGE)
    rows, text, images = settings.batch_size, settings.text_length, settings.max_images
    if measure == "train":
        return flops.train_step(model, settings.groups, rows, text, images)
    parts = dataclasses.replace(flops.prefill(model, text, images), vision=0)
    if measure == "second":  # of keys and values the text's alone
        visual = images * model.num_visual_tokens
        parts = dataclasses.replace(parts, projectors=0, kv=parts.kv * text / (text + visual))
    if measure == "decode":  # a token's part of a prompt without images, and attention to all that stands before
        alone, before = flops.prefill(model, text, 0), text + images * model.num_visual_tokens
        attention = 4 * before * model.num_heads * model.head_dim * model.num_layers
        layers = sum(getattr(alone, part) for part in ("q", "kv", "o", "mlp")) / text
        return rows * (layers + attention + alone.head)
    return rows * parts.total


# --- measuring --------------------------------------------------------------------------------------------------------


def bench(case: Case, measures: Sequence[str], runtimes: Sequence[str], rounds: int, attention: str) -> Iterator[Found]:
    """Times a case, measure by measure.

    Args:
      case: a size, rows and a dtype.
      measures: of MEASURES.
      runtimes: of PyTorch, of RUNTIMES; none: this program alone.
      rounds: calls of each program.
      attention: `model.attention_impl` of training.

    Raises:
      ConfigError: torch is not installed, or computes on another kind of device.
      DisagreeError: the outputs of a peer are not those of this program.
    """
    size, programs, configs = SIZES[case.size], [], {}
    in_torch = peers() if runtimes else None
    for alignment in ("saisa", "llava"):
        program, config, start = ours(size, alignment, case, measures, attention)
        programs.append(program)
        configs[alignment] = config
        if in_torch is not None:
            made = in_torch.programs(size, config, start, case.dtype, TOKENS, measures, runtimes)
            programs += [Program(name, alignment, *found) for name, *found in made]
    for measure in measures:
        taking = {f"{one.alignment}, {one.name}": one for one in programs if measure in one.calls}
        flops_of = {alignment: needed(config, measure) for alignment, config in configs.items()}
        timed = {name: Timed(flops_of[one.alignment]) for name, one in taking.items()}
        differences = compare(taking, case, measure)
        for one in taking.values():  # compiles what is not compiled yet
            one.calls[measure]()
        watch, per = Watch(), TOKENS if measure == "decode" else 1
        for name, call in in_turns({name: one.calls[measure] for name, one in taking.items()}, rounds):
            timed[name].add(call, per)
        yield Found(case, measure, timed, differences, watch.stop())


def compare(programs: Mapping[str, Program], case: Case, measure: str) -> dict[str, float]:
    """The largest difference of each program's output from that of ours, as a share of the largest output.

    Raises:
      DisagreeError: one is larger than rounding explains.
    """
    right, differences = {}, {}
    for name, one in programs.items():  # ours stands before its peers
        answer = np.asarray(one.answers[measure](), np.float32)
        ours = right.setdefault(one.alignment, answer)
        ours = ours[..., : answer.shape[-1]] if answer.ndim else ours  # without the padding of the vocabulary
        differences[name] = float(np.max(np.abs(ours - answer)) / np.max(np.abs(ours)))
        if not differences[name] <= TOLERANCE[case.dtype]:
            raise DisagreeError(
                f"{measure} of {name} differs from this program's by {differences[name]:.2g} of the largest output; in "
                f"{case.dtype} {TOLERANCE[case.dtype]:g} may be rounding. Times of different things are not compared"
            )
    return differences


def peers() -> Any:
    """The module of PyTorch's programs.

    Raises:
      ConfigError: torch is not installed.
    """
    try:
        return importlib.import_module("saisa_jax.bench.in_torch.programs")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ConfigError(
            "bench peers needs torch: pip install torch==2.13.0+cpu (of your CUDA on a GPU; in a clone `TORCH=1 make "
            "torch`), or measure this program alone with --runtimes=none"
        ) from error
