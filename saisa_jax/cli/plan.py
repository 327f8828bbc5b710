"""`python -m saisa_jax plan`: whether a recipe fits accelerators that are not here, and what it costs there.

python -m saisa_jax plan --config=configs/saisa_vicuna_7b.py:finetune --topology=v5e:4x4
python -m saisa_jax plan --config=configs/saisa_vicuna_7b.py:finetune --topology=v5e:2x2 --generate
"""

from __future__ import annotations

from collections.abc import Sequence

import jax

from saisa_jax.chips import CHIPS
from saisa_jax.cli.flags import read_config
from saisa_jax.cli.parser import Parser
from saisa_jax.config import DTYPES, ConfigError
from saisa_jax.inference.memory import Shape
from saisa_jax.planning import tables
from saisa_jax.planning.generation import plan_generation
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
    parser.add_switch("generate", False, "the programs that eval.py runs with the finished model, not training's")
    parser.add_argument(
        "--text", type=int, default=128, help="with --generate: text tokens of a question (default 128)"
    )
    parser.add_argument("--images", type=int, default=1, help="with --generate: pictures of a question (default 1)")
    parser.add_argument("--max_new_tokens", type=int, default=16, help="with --generate: of an answer (default 16)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="with --generate: of parameters and "
                        "activations (default bfloat16)")  # fmt: skip
    parser.add_argument("--batch_size", type=int, help="with --generate: questions at once, over all devices; default: "
                        "what the memory has room for")  # fmt: skip
    options, rest = parser.parse_known_args(argv)
    config = read_config(rest)
    if options.topology is None:
        raise ConfigError("--topology is missing; for example --topology=v5e:4x4")
    topology = parse(options.topology)
    jax.config.update("jax_platforms", "cpu")  # nothing runs; leave accelerators alone
    console = tables.console()
    if options.generate:
        sizes = {name: getattr(options, name) for name in ("text", "images", "max_new_tokens", "batch_size")}
        for name, value in sizes.items():
            if value is not None and value < (name != "images"):
                raise ConfigError(f"--{name}={value} is too small")
        shape = Shape(options.text, options.max_new_tokens, options.images * config.model.vision.max_views)
        return 0 if plan_generation(console, config, topology, shape, options.dtype, options.batch_size) else 1
    fits = True
    for stage in config.stages:
        packing, vision = config.data.packing, config.model.vision
        long = length(config.stage(stage), packing, vision, options.samples, options.samples_per_row)
        fits &= plan_stage(console, config, stage, topology, long, options.hfu, options.remedies, options.compare)
    return 0 if fits else 1
