"""`python -m saisa_jax rows`: which rows, of T text tokens and M image slots, cost least for a stage's samples.

python -m saisa_jax rows --config=configs/saisa_vicuna_7b.py --stage=finetune

Without the sources of the recipe, `--lengths=llava-pretrain` and `--lengths=llava-finetune` stand for the paper's data.
"""

from __future__ import annotations

from collections.abc import Sequence

from saisa_jax.cli.flags import read_config
from saisa_jax.cli.parser import Parser
from saisa_jax.config import STAGES
from saisa_jax.data.pipeline import stage_counts
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.planning import rows
from saisa_jax.planning.lengths import LENGTHS, in_slots
from saisa_jax.planning.tables import console


def main(argv: Sequence[str]) -> int:
    """The verb `rows`.

    Raises:
      DataError: the data cannot be used.
    """
    parser = Parser(
        prog="python -m saisa_jax rows",
        description=__doc__,
        usage="%(prog)s --config=RECIPE[:ARGUMENT] [--config.NAME=VALUE ...] [options]",
    )
    parser.add_argument("--stage", choices=STAGES, default="finetune", help="default: finetune")
    parser.add_argument("--lengths", choices=sorted(LENGTHS), help="stand-ins for the recipe's sources")
    options, rest = parser.parse_known_args(argv)
    config = read_config(rest)
    if options.lengths:
        counts = in_slots(LENGTHS[options.lengths](), config.model.vision)
    else:
        counts = stage_counts(config, options.stage, load_tokenizer(config.data.tokenizer))
    choices = rows.compare(config, options.stage, counts)
    console().print(rows.table(choices, rows.SAMPLES_PER_STEP[options.stage]))
    return 0
