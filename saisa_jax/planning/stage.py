"""A stage of a recipe on accelerators that are not here: compiled, and printed with what it costs."""

from __future__ import annotations

import dataclasses

from rich.console import Console

from saisa_jax.config import Config, DistillConfig, FlamingoConfig
from saisa_jax.planning import remedies, tables
from saisa_jax.planning.compile import Program, compile_stage
from saisa_jax.planning.lengths import Length
from saisa_jax.planning.topologies import Topology

# Hardware FLOPs utilisation that is assumed: well-tuned dense models of this size reach an MFU of 0.4 to 0.55, and with
# full recomputation 4/3 of it.
HFU = 0.5


def plan_stage(
    console: Console,
    config: Config,
    stage: str,
    topology: Topology,
    long: Length,
    hfu: float = HFU,
    remedy: bool = True,
    compare: bool = False,
) -> bool:
    """Compiles a stage for a topology and prints what it costs; whether it fits, or can be made to.

    Args:
      long: how long the stage is.
      hfu: the assumed share of the peak that executed FLOPs reach.
      remedy: if it does not fit, compile what may.
      compare: compile the LLaVA alignment as well.
    """
    program = compile_stage(config, stage, topology, long.steps)
    console.print(tables.verdict(program), highlight=False)
    if not program.fits and remedy and (found := _remedy(console, config, stage, topology, long.steps)):
        config, program = found[0].config, found[1]
    programs = [program]
    if compare and config.model.alignment != "llava":
        programs.append(compile_stage(as_llava(config), stage, topology, long.steps))
    console.print(tables.table([tables.Plan(each, long, hfu) for each in programs]))
    console.print(
        f"{topology.chip.source}: {topology.chip.flops / 1e12:.0f} TFLOP/s in bfloat16, "
        f"{topology.chip.hbm_bandwidth / 1e9:.0f} GB/s of memory, {topology.chip.link_bandwidth / 1e9:.0f} GB/s "
        "received over links. Samples of a step are those of stand-ins for the lengths of the paper's data.",
        highlight=False,
        soft_wrap=True,
    )
    return program.fits


def as_llava(config: Config) -> Config:
    """The same recipe with LLaVA's alignment: what SAISA saves is measured against it."""
    shared = lambda part: dataclasses.replace(part, sharing="shared")  # noqa: E731
    model = dataclasses.replace(
        config.model,
        alignment="llava",
        visual_layers=None,
        flamingo=FlamingoConfig(),
        projector=shared(config.model.projector),
    )
    stages = {"pretrain": shared(config.pretrain), "finetune": shared(config.finetune)}
    return dataclasses.replace(config, model=model, distill=DistillConfig(), **stages)


def _remedy(
    console: Console, config: Config, stage: str, topology: Topology, steps: int
) -> tuple[remedies.Remedy, Program] | None:
    found = remedies.find(config, stage, topology, steps)
    failed = "neither recomputation nor accumulation nor lighter moments make it fit: take a larger slice"
    console.print(f"it does with {found[0]}" if found else failed, highlight=False, soft_wrap=True)
    return found
