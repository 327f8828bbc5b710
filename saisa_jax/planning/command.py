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
from saisa_jax.config import Config, ConfigError, from_config_dict, nearest_fields
from saisa_jax.planning import remedies, tables
from saisa_jax.planning.compile import Program, compile_stage
from saisa_jax.planning.roofline import length
from saisa_jax.planning.topologies import Topology, parse


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
    console = Console()
    fits = True
    for stage in config.stages:
        settings = config.stage(stage)
        long = length(settings, config.data.packing, values.samples, values.samples_per_row)
        program = compile_stage(config, stage, topology, long.steps)
        console.print(tables.verdict(program), highlight=False)
        if not program.fits and values.remedies:
            found = _remedy(console, config, stage, topology, long.steps)
            program = found or program
        fits &= program.fits
        programs = [program]
        if values.compare and config.model.alignment != "llava":
            programs.append(compile_stage(as_llava(config), stage, topology, long.steps))
        console.print(tables.table([tables.Plan(each, long, values.mfu) for each in programs]))
    console.print(
        f"{topology.chip.source}: {topology.chip.flops / 1e12:.0f} TFLOP/s in bfloat16, "
        f"{topology.chip.hbm_bandwidth / 1e9:.0f} GB/s of memory, {topology.chip.link_bandwidth / 1e9:.0f} GB/s "
        "received over links. Loops count as often as they run. Samples of a step are an estimate from mean lengths.",
        highlight=False,
    )
    return 0 if fits else 1


def as_llava(config: Config) -> Config:
    """The same recipe with LLaVA's alignment: what SAISA saves is measured against it."""
    shared = lambda part: dataclasses.replace(part, sharing="shared")  # noqa: E731
    model = dataclasses.replace(
        config.model, alignment="llava", visual_layers=None, projector=shared(config.model.projector)
    )
    return dataclasses.replace(config, model=model, pretrain=shared(config.pretrain), finetune=shared(config.finetune))


def _remedy(console: Console, config: Config, stage: str, topology: Topology, steps: int) -> Program | None:
    found = remedies.find(config, stage, topology, steps)
    if found is None:
        console.print("neither recomputation nor accumulation makes it fit: take a larger slice", highlight=False)
        return None
    remedy, program = found
    console.print(f"it does with {remedy}", highlight=False, soft_wrap=True)
    return program


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
    flags.DEFINE_float("mfu", 0.4, "share of the peak that is assumed to be reached", flag_values=values)
    flags.DEFINE_integer("samples", None, "of the sources; none: LLaVA's, by file name", flag_values=values)
    flags.DEFINE_float("samples_per_row", None, "of a packed row; none: estimated", flag_values=values)
    if {"-h", "--help"} & set(argv):
        print(__doc__, values.get_help(), sep="\n")
        return values, None
    for argument in argv:
        path = argument.removeprefix("--config.").split("=")[0].split("[")[0]
        if argument.startswith("--config.") and (near := nearest_fields(path)):
            wanted = " or ".join(f"--config.{name}" for name in near)
            raise ConfigError(f"there is no --config.{path}; did you mean {wanted}?")
    try:
        rest = values(whole)[1:]
        missing = [name for name in ("config", "topology") if getattr(values, name) is None]
        config = None if missing else from_config_dict(Config, values.config)
    except (flags.Error, AttributeError, KeyError, TypeError, OSError) as error:
        raise ConfigError(str(error).strip().splitlines()[-1].split("ConfigError: ")[-1]) from error
    if rest or config is None:
        said = f"unexpected arguments {rest}" if rest else f"--{missing[0]} is missing"
        raise ConfigError(f"{said}; for example --config=configs/saisa_vicuna_7b.py:finetune --topology=v5e:4x4")
    return values, config
