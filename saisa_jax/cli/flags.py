"""`--config=RECIPE[:argument] --config.a.b=v` on a command line; what is wrong with it is said in one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from saisa_jax.config.checks import ConfigError
from saisa_jax.config.config_dict import from_config_dict, nearest_fields
from saisa_jax.config.run import Config
from saisa_jax.errors import did_you_mean

RECIPES = Path(__file__).parents[1] / "configs"  # in a clone a link to configs/, installed a copy
NO_RECIPES = ("__init__", "common")


def find_recipe(name: str) -> str:
    """A recipe's file: a path as it is, a name from those that come with the program; `:argument` stays.

    Raises:
      ConfigError: neither a file nor a known name.
    """
    name, colon, argument = name.partition(":")
    if not Path(name).is_file():
        known = sorted(path.stem for path in RECIPES.glob("*.py") if path.stem not in NO_RECIPES)
        if name not in known:
            hint = did_you_mean(Path(name).stem, known, otherwise=f"; or a name: {', '.join(known)}")
            raise ConfigError(f"--config: there is no recipe {name}: neither a file nor a known name{hint}")
        name = str(RECIPES / f"{name}.py")
    return f"{name}{colon}{argument}"


def parse_flags(argv: Sequence[str], values: flags.FlagValues) -> list[str]:
    """Parses a command line, of which `argv[0]` is the program, as absl does; returns what is no flag.

    Args:
      values: the flags that there are, a recipe's `config` among them.

    Raises:
      ConfigError: a setting that there is not, with the nearest ones; a recipe or a value that cannot be read.
    """
    for argument in argv:
        path = argument.removeprefix("--config.").split("=")[0].split("[")[0]
        if argument.startswith("--config.") and (near := nearest_fields(path)):
            raise ConfigError(
                f"there is no --config.{path}; did you mean {' or '.join('--config.' + name for name in near)}?"
            )
    try:
        rest = values(argv)
        recipe = values["config"].value
        _ = recipe and recipe.stages  # a recipe that could not be read says so when it is used
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        caught = error
        while error.args and isinstance(error.args[0], Exception):  # ConfigDict wraps one in the other
            error = error.args[0]
        lines = str(error.args[0] if len(error.args) == 1 else error).strip().splitlines()
        _, by_recipe, said = lines[-1].strip().rpartition("ConfigError: ")
        names_itself = by_recipe or isinstance(caught, flags.Error)
        raise ConfigError(said if names_itself else f"--config: {said}") from error


def read_config(arguments: Sequence[str]) -> Config:
    """The configuration that `--config=RECIPE --config.a.b=v ...` describe, by themselves.

    Raises:
      ConfigError: as `find_recipe` and `parse_flags`; no recipe, other arguments, or a configuration that cannot run.
    """
    argv = [""]
    for argument in arguments:
        if argument.startswith("--config="):
            argument = f"--config={find_recipe(argument.removeprefix('--config='))}"
        argv.append(find_recipe(argument) if argv[-1] == "--config" else argument)
    values = flags.FlagValues()
    recipe = config_flags.DEFINE_config_file("config", None, "The recipe.", flag_values=values, sys_argv=argv)
    if rest := parse_flags(argv, values)[1:]:
        raise ConfigError(f"unexpected arguments {rest}; settings are written --config.name=value")
    if recipe.value is None:
        raise ConfigError("--config is missing: name a recipe, for example --config=configs/demo.py")
    return from_config_dict(Config, recipe.value)
