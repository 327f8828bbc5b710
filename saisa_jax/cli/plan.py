"""`python -m saisa_jax plan`: whether a recipe fits accelerators that are not here, and what it costs there.

python -m saisa_jax plan --config=configs/saisa_vicuna_7b.py:finetune --topology=v5e:4x4
"""

from __future__ import annotations

from collections.abc import Sequence

import jax

from saisa_jax.chips import CHIPS
from saisa_jax.cli.flags import read_config
from saisa_jax.cli.parser import Parser
from saisa_jax.config import ConfigError
from saisa_jax.planning import tables
from saisa_jax.planning.lengths import length
from saisa_jax.planning.stage import HFU, plan_stage
from saisa_jax.planning.topologies import parse


def main(argv: Sequence[str]) -> int:
    """The verb `plan`; 1 if a stage does not fit and nothing that was tried makes it.

    Raises:
      ConfigError: an unknown topology or field, or a compiler that is not installed.
    """
    parser = Parser(
        prog="python -m saisa_jax plan",
        description=__doc__,
        usage="%(prog)s --config=RECIPE[:ARGUMENT] --topology=NAME [--config.NAME=VALUE ...] [options]",
    )
    chips = ", ".join(f"{kind}:{chip.example}" for kind, chip in CHIPS.items())
    parser.add_argument("--topology", help=f"what to compile for: {chips}")
    parser.add_switch("compare", False, "compile the LLaVA alignment as well")
    parser.add_switch("remedies", True, "if it does not fit, compile what may")
    parser.add_argument(
        "--hfu",
        type=float,
        default=HFU,
        help=f"share of the peak that executed FLOPs are assumed to reach (default {HFU})",
    )
    parser.add_argument("--samples", type=int, help="of the sources; default: LLaVA's, by file name")
    parser.add_argument("--samples_per_row", type=float, help="of a packed row; default: estimated")
    options, rest = parser.parse_known_args(argv)
    config = read_config(rest)
    if options.topology is None:
        raise ConfigError("--topology is missing; for example --topology=v5e:4x4")
    topology = parse(options.topology)
    jax.config.update("jax_platforms", "cpu")  # nothing runs; leave accelerators alone
    console = tables.console()
    fits = True
    for stage in config.stages:
        long = length(config.stage(stage), config.data.packing, options.samples, options.samples_per_row)
        fits &= plan_stage(console, config, stage, topology, long, options.hfu, options.remedies, options.compare)
    return 0 if fits else 1
