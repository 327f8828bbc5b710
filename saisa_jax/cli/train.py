"""Trains SAISA, NAAViT or LLaVA:  python train.py --config=configs/demo.py --workdir=runs/demo [--config.a.b=v ...]

A run that was stopped goes on where it was when it is started again with the same command. With --dry_run nothing runs:
configuration, parameters, batch, bytes and FLOPs are printed, for the devices that there are or for --topology=v5e:4x4.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
from collections.abc import Sequence

from absl import flags, logging
from etils import epath

from saisa_jax.cli.parser import Parser
from saisa_jax.errors import UserError


def main(argv: Sequence[str]) -> int:
    """The verb `train`: 0; 1 if the run failed; 128 and the signal's number if it was stopped by one.

    Raises:
      ConfigError: the recipe cannot be.
    """
    parser = Parser("train", __doc__, recipe=True)
    parser.add_argument("--workdir", help="where checkpoints, metrics and the finished model go")
    parser.add_switch("dry_run", False, "print what the run would be, and start nothing")
    parser.add_argument("--topology", help="with --dry_run: the accelerators to compile for, such as v5e:4x4")
    options, config = parser.parse_recipe(argv)
    if not (options.workdir or options.dry_run) or (options.topology and not options.dry_run):
        parser.error("name --workdir for a run; or --dry_run, alone or with --topology, for what it would be")
    logging.use_absl_handler()
    flags.FLAGS.mark_as_parsed()  # Grain reads its own, which keep their defaults
    faulthandler.enable()
    try:
        if options.dry_run:
            from saisa_jax.planning import dry_run  # imports jax, which --help does not need

            return dry_run.run(config, options.topology)
        from saisa_jax.training import loop

        stopped = loop.run(config, epath.Path(options.workdir))
    except (UserError, OSError) as error:  # OSError: a disk that is full, for example
        logging.debug("details", exc_info=True)
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped at once; the same command goes on from the last checkpoint.", file=sys.stderr)
        return 128 + signal.SIGINT
    return 128 + stopped if stopped else 0
