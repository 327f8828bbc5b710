"""Trains SAISA, NAAViT or LLaVA:  python train.py --config=configs/demo.py --workdir=runs/demo [--config.a.b=v ...]

A run that was stopped goes on where it was when it is started again with the same command.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from saisa_jax.command_line import UserError
from saisa_jax.config import Config, from_config_dict, nearest_fields

_CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe, for example configs/demo.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and the finished model go.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings are written --config.name=value")
    from saisa_jax.training import loop  # imports jax, which --help does not need

    try:
        config = from_config_dict(Config, _CONFIG.value)
        stopped = loop.run(config, epath.Path(str(_WORKDIR.value)))
    except UserError as error:
        logging.debug("details", exc_info=True)
        sys.exit(f"{type(error).__name__}: {error}")
    if stopped:
        sys.exit(128 + stopped)


def _parse_flags(argv: list[str]) -> list[str]:
    """As absl does, but what is wrong with --config is one line and not a page."""
    for argument in argv:
        path = argument.removeprefix("--config.").split("=")[0].split("[")[0]
        if argument.startswith("--config.") and (near := nearest_fields(path)):
            sys.exit(f"there is no --config.{path}; did you mean {' or '.join('--config.' + name for name in near)}?")
    try:
        rest = flags.FLAGS(argv)
        _ = _CONFIG.value and _CONFIG.value.stages  # a recipe that could not be read says so when it is used
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        while error.args and isinstance(error.args[0], Exception):  # ConfigDict wraps one in the other
            error = error.args[0]
        lines = str(error.args[0] if len(error.args) == 1 else error).strip().splitlines()
        sys.exit(f"--config: {lines[-1].strip()}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=_parse_flags)
