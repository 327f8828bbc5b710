"""A finished model of any step of a run: to ask, to evaluate, to export, or to start another run from.

python -m saisa_jax checkpoint export --from=WORKDIR/finetune/checkpoints/N --to=MODEL
"""

from __future__ import annotations

from collections.abc import Sequence

from saisa_jax.cli.parser import Parser


def main(argv: Sequence[str]) -> int:
    """The verb `checkpoint export`.

    Raises:
      CheckpointError, ConfigError: there is no such step, what its run started from is gone, or writing failed.
    """
    parser = Parser("checkpoint export", __doc__)
    parser.add_argument("--from", dest="source", required=True, help="WORKDIR/STAGE/checkpoints/N, or WORKDIR@N")
    parser.add_argument("--to", required=True, help="the finished model: a directory")
    options = parser.parse_args(argv)
    import jax  # which --help does not need

    jax.config.update("jax_platforms", "cpu")  # files and host memory alone: leave accelerators to others
    from saisa_jax.training.model_of_step import save_model_of_step

    parameters = save_model_of_step(options.source, options.to)
    print(f"{options.to}: the model of {options.source}, {parameters:,} parameters")
    return 0
