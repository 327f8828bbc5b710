"""Trains SAISA, NAAViT or LLaVA:  python train.py --config=configs/demo.py --workdir=runs/demo [--config.a.b=v ...]

A run that was stopped goes on where it was when it is started again with the same command. With --dry_run nothing runs:
configuration, parameters, batch, bytes and FLOPs are printed, for the devices that there are or for --topology=v5e:4x4.
"""

import signal
import sys

from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from saisa_jax.cli.flags import parse_flags
from saisa_jax.cli.process import quiet_libraries
from saisa_jax.config import Config, ConfigError, from_config_dict
from saisa_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe, for example configs/demo.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and the finished model go.")
_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print what the run would be, and start nothing.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "With --dry_run: the accelerators to compile for, such as v5e:4x4.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings are written --config.name=value")
    if not (_WORKDIR.value or _DRY_RUN.value) or (_TOPOLOGY.value and not _DRY_RUN.value):
        raise app.UsageError("name --workdir for a run; or --dry_run, alone or with --topology, for what it would be")
    try:
        config = from_config_dict(Config, _CONFIG.value)
        if _DRY_RUN.value:
            from saisa_jax.planning import dry_run  # imports jax, which --help does not need

            sys.exit(dry_run.run(config, _TOPOLOGY.value))
        from saisa_jax.training import loop

        stopped = loop.run(config, epath.Path(str(_WORKDIR.value)))
    except (UserError, OSError) as error:  # OSError: a disk that is full, for example
        logging.debug("details", exc_info=True)
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        print("Stopped at once; the same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    if stopped:
        sys.exit(128 + stopped)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return parse_flags(argv)
    except ConfigError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    quiet_libraries()
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=_parse_flags)
