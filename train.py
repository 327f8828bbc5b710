"""Trains SAISA, NAAViT or LLaVA:  python train.py --config=configs/demo.py --workdir=runs/demo [--config.a.b=v ...]

A run that was stopped goes on where it was when it is started again with the same command.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from saisa_jax.config import Config, from_config_dict

_CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe, for example configs/demo.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and the finished model go.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings are written --config.name=value")
    from saisa_jax.training import loop  # imports jax, which --help does not need

    try:
        config = from_config_dict(Config, _CONFIG.value)
        stopped = loop.run(config, epath.Path(str(_WORKDIR.value)))
    except loop.USER_ERRORS as error:
        logging.debug("details", exc_info=True)
        sys.exit(f"{type(error).__name__}: {error}")
    if stopped:
        sys.exit(128 + stopped)


def _parse_flags(argv: list[str]) -> list[str]:
    """As absl does, but what is wrong with --config is one line and not a page."""
    try:
        rest = app.parse_flags_with_usage(argv)
        _ = _CONFIG.value  # a file that is not there is noticed here
        return rest
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        while error.args and isinstance(error.args[0], Exception):  # ConfigDict wraps one in the other
            error = error.args[0]
        sys.exit(f"--config: {error.args[0] if len(error.args) == 1 else error}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=_parse_flags)
