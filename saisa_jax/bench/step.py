"""`python -m saisa_jax bench step`: the time of a training step of SAISA, NAAViT and LLaVA on this machine.

The step is stage 2's own: everything but the vision encoder trains, with AdamW. The alignments alternate in one run
(`times.py`); beside a ratio of times is the ratio of the FLOPs (`saisa_jax/flops.py`). On a CPU the processor time of
all threads is shown as well.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.table import Table

from saisa_jax import flops, parallel
from saisa_jax.batch import Batch
from saisa_jax.bench.sizes import of_alignment
from saisa_jax.bench.times import Timed, in_turns, middle, ratios
from saisa_jax.chips import peak_flops
from saisa_jax.config import ALIGNMENTS, Config, ModelConfig, StageConfig, VisionConfig
from saisa_jax.models.saisa import init_params
from saisa_jax.report.runs import NAMES
from saisa_jax.testing.batches import make_batch, random_layout
from saisa_jax.training.setup import setup_stage
from saisa_jax.training.state import create_state
from saisa_jax.training.step import make_train_step

STAGE = "finetune"


def make_config(alignment: str, options: argparse.Namespace) -> Config:
    """A model of the given size; its encoder is a quarter as wide as the decoder, as CLIP is to a Llama of 7B."""
    width = options.embed // 4
    model = ModelConfig(
        **of_alignment(alignment, options.layers),
        vocab_size=options.vocab,
        embed_dim=options.embed,
        num_layers=options.layers,
        num_heads=options.embed // 64,
        num_kv_heads=options.embed // 64,
        head_dim=64,
        mlp_dim=options.mlp,
        max_length=options.text + options.images * options.visual,
        dtype=options.dtype,
        attention_impl=options.attention,
        vision=VisionConfig(
            image_size=14 * round(options.visual**0.5),
            patch_size=14,
            embed_dim=width,
            num_layers=options.layers,
            num_heads=max(1, width // 64),
            mlp_dim=4 * width,
        ),
    )
    stage = StageConfig(
        sharing=model.projector.sharing,
        batch_size=options.rows,
        text_length=options.text,
        max_images=options.images,
    )
    return Config(name=f"bench-{alignment}", stages=(STAGE,), model=model, finetune=stage)


def make_rows(config: Config) -> Batch:
    """Rows of random tokens without padding, every image slot full, images anywhere."""
    settings, rng = config.stage(STAGE), np.random.default_rng(0)
    layouts = [
        random_layout(rng, settings.text_length, settings.max_images, config.model.vocab_size)
        for _ in range(settings.batch_size)
    ]
    return make_batch(config.model, layouts)


def make_step(config: Config) -> tuple[Callable[[], None], float]:
    """A function that trains one step and returns when it is done, and the FLOPs of a step."""
    stage = setup_stage(config, STAGE, steps=1000)
    with parallel.use(stage.mesh, stage.rules):
        make_params = lambda key: init_params(stage.model, key)  # noqa: E731
        state = create_state(make_params, jax.random.key(0), stage.settings.groups, stage.optimizer, stage.shardings)
        batch = parallel.to_device(make_rows(config), stage.mesh)
    train_step = make_train_step(stage.model, stage.optimizer, stage.shardings, loss_chunk=config.training.loss_chunk)
    held: dict[str, Any] = {"state": state}

    def step() -> None:
        with parallel.use(stage.mesh, stage.rules):
            held["state"], metrics = train_step(held["state"], batch)
        jax.block_until_ready((held["state"], metrics))

    s = stage.settings
    return step, flops.train_step(stage.model, s.groups, s.batch_size, s.text_length, s.max_images)


def bench(options: argparse.Namespace) -> dict[str, Timed]:
    """Times the alignments, alternating.

    Returns:
      {alignment: Timed}; round i is the i-th of each.
    """
    steps = {alignment: make_step(make_config(alignment, options)) for alignment in ALIGNMENTS}
    timed = {alignment: Timed(needed) for alignment, (_, needed) in steps.items()}
    for step, _ in steps.values():
        step()  # compiles
    for alignment, step in in_turns({alignment: step for alignment, (step, _) in steps.items()}, options.repeat):
        timed[alignment].add(step)
    return timed


def table(timed: dict[str, Timed]) -> Table:
    """A column for each alignment."""
    peak, llava = peak_flops(jax.devices()), timed["llava"]
    shown = Table("", *(NAMES[name] for name in timed))
    for column in shown.columns[1:]:
        column.justify = "right"

    def row(name: str, of: Callable[[Timed], str]) -> None:
        shown.add_row(name, *map(of, timed.values()))

    def rate(one: Timed) -> str:
        speed = one.flops / one.median
        return f"{speed / peak:.1%}" if peak else f"{speed / 1e9:,.0f}"

    row("ms a step", lambda one: f"{1e3 * one.median:,.0f}")
    row("of LLaVA's", lambda one: f"{statistics.median(ratios(one.seconds, llava.seconds)):.2f}")
    row("in half of the rounds", lambda one: "{:.2f} to {:.2f}".format(*middle(ratios(one.seconds, llava.seconds))))
    if jax.default_backend() == "cpu":
        row("processor ms a step", lambda one: f"{1e3 * one.processor_median:,.0f}")
        row("of LLaVA's", lambda one: f"{statistics.median(ratios(one.processor, llava.processor)):.2f}")
    row("GFLOPs a step needs", lambda one: f"{one.flops / 1e9:,.4g}")
    row("of LLaVA's", lambda one: f"{one.flops / llava.flops:.2f}")
    row("MFU" if peak else "GFLOP/s", rate)
    return shown
