"""`python -m saisa_jax plan`: a recipe on accelerators that are not here.

python -m saisa_jax plan --config=configs/saisa_vicuna_7b.py:finetune --topology=v5e:4x4
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags
from rich.console import Console

from saisa_jax.chips import CHIPS
from saisa_jax.cli.flags import parse_flags
from saisa_jax.config import Config, ConfigError, from_config_dict
from saisa_jax.planning import remedies, tables
from saisa_jax.planning.compile import Program, compile_stage
from saisa_jax.planning.lengths import Length, length
from saisa_jax.planning.topologies import Topology, parse

MFU = 0.4  # model FLOPs utilisation that is assumed; well-tuned dense models of this size reach 0.4 to 0.55


def main(argv: Sequence[str]) -> int:
    """The verb `plan`; 1 if a stage does not fit and nothing that was tried makes it.

    Raises:
      ConfigError: an unknown topology, flag or field, or a compiler that is not installed.
    """
    values, config = _parse(argv)
    if config is None:
        return 0
    topology = parse(values.topology)
    jax.config.update("jax_platforms", "cpu")  # nothing runs; leave accelerators alone
    console = tables.console()
    fits = True
    for stage in config.stages:
        long = length(config.stage(stage), config.data.packing, values.samples, values.samples_per_row)
        fits &= plan_stage(console, config, stage, topology, long, values.mfu, values.remedies, values.compare)
    return 0 if fits else 1


def plan_stage(
    console: Console,
    config: Config,
    stage: str,
    topology: Topology,
    long: Length,
    mfu: float = MFU,
    remedy: bool = True,
    compare: bool = False,
) -> bool:
    """Compiles a stage for a topology and prints what it costs; whether it fits, or can be made to.

    Args:
      long: how long the stage is.
      mfu: the assumed share of the peak.
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
    console.print(tables.table([tables.Plan(each, long, mfu) for each in programs]))
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
        config.model, alignment="llava", visual_layers=None, projector=shared(config.model.projector)
    )
    return dataclasses.replace(config, model=model, pretrain=shared(config.pretrain), finetune=shared(config.finetune))


def _remedy(
    console: Console, config: Config, stage: str, topology: Topology, steps: int
) -> tuple[remedies.Remedy, Program] | None:
    found = remedies.find(config, stage, topology, steps)
    failed = "neither recomputation nor accumulation nor lighter moments make it fit: take a larger slice"
    console.print(f"it does with {found[0]}" if found else failed, highlight=False, soft_wrap=True)
    return found


def _parse(argv: Sequence[str]) -> tuple[Any, Config | None]:
    """Flags and configuration; None: only help was asked for.

    Raises:
      ConfigError: what is wrong, in a line.
    """
    values = flags.FlagValues()
    whole = ["plan", *argv]
    config_flags.DEFINE_config_file("config", None, "the recipe", flag_values=values, sys_argv=whole)
    chips = ", ".join(f"{kind}:{chip.example}" for kind, chip in CHIPS.items())
    flags.DEFINE_string("topology", None, f"what to compile for: {chips}", flag_values=values)
    flags.DEFINE_boolean("compare", False, "compile the LLaVA alignment as well", flag_values=values)
    flags.DEFINE_boolean("remedies", True, "if it does not fit, compile what may", flag_values=values)
    flags.DEFINE_float("mfu", MFU, "share of the peak that is assumed to be reached", flag_values=values)
    flags.DEFINE_integer("samples", None, "of the sources; none: LLaVA's, by file name", flag_values=values)
    flags.DEFINE_float("samples_per_row", None, "of a packed row; none: estimated", flag_values=values)
    if {"-h", "--help"} & set(argv):
        print(__doc__, values.get_help(), sep="\n")
        return values, None
    rest = parse_flags(whole, values)[1:]
    missing = [name for name in ("config", "topology") if getattr(values, name) is None]
    if rest or missing:
        said = f"unexpected arguments {rest}" if rest else f"--{missing[0]} is missing"
        raise ConfigError(f"{said}; for example --config=configs/saisa_vicuna_7b.py:finetune --topology=v5e:4x4")
    return values, from_config_dict(Config, values.config)
