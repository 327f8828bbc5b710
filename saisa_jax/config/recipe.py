"""A recipe and its overrides from the command line, `--config=RECIPE[:argument] --config.a.b=value`, for the verbs."""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from saisa_jax.config.checks import ConfigError
from saisa_jax.config.flags import from_config_dict, nearest_fields
from saisa_jax.config.run import Config


def read_recipe(argv: Sequence[str]) -> tuple[Config, list[str]]:
    """The configuration, and the arguments that are not about it.

    Raises:
      ConfigError: no `--config`, a recipe that cannot be read, a field that does not exist, or a value that cannot be.
    """
    about = [argument for argument in argv if argument.startswith(("--config=", "--config."))]
    rest = [argument for argument in argv if argument not in about]
    if not any(argument.startswith("--config=") for argument in about):
        raise ConfigError("--config=RECIPE is missing, for example --config=configs/demo.py")
    for argument in about:
        path = argument.removeprefix("--config.").split("=")[0].split("[")[0]
        if argument.startswith("--config.") and (near := nearest_fields(path)):
            raise ConfigError(
                f"there is no --config.{path}; did you mean {' or '.join('--config.' + name for name in near)}?"
            )
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", None, "The recipe.", flag_values=values)
    try:
        values(["saisa_jax", *about])
        return from_config_dict(Config, holder.value), rest
    except ConfigError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        cause: Exception = error
        while cause.args and isinstance(cause.args[0], Exception):  # ConfigDict wraps one in the other
            cause = cause.args[0]
        lines = str(cause.args[0] if len(cause.args) == 1 else cause).strip().splitlines()
        raise ConfigError(f"--config: {lines[-1].strip() if lines else type(cause).__name__}") from error
