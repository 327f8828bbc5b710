"""The parser of the verbs: a flag that does not exist is answered with the nearest ones, and recipes are read."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from saisa_jax.compilation import OFF
from saisa_jax.errors import did_you_mean

if TYPE_CHECKING:
    from saisa_jax.config import Config

CACHE_FLAG = "--compilation_cache"
# Of those that compile on the devices that there are; chat tells of it by itself.
COMPILING_VERBS = frozenset({"train", "eval", "chat", "report", "checkpoint export", "bench image", "bench step",
                             "bench peers", "bench growth", "bench parts"})  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with descriptions as they are written.

    Args:
      verb: as on the command line, for example "data prepare".
      description: what it does; a module's docstring, for example.
      recipe: whether `--config=RECIPE --config.a.b=v` is read as well, by `parse_recipe`.
    """

    def __init__(self, verb: str = "", description: str | None = None, *, recipe: bool = False, **options: Any) -> None:
        options = {
            "prog": f"python -m saisa_jax {verb}",
            "allow_abbrev": False,
            "formatter_class": argparse.RawDescriptionHelpFormatter,
        } | options
        super().__init__(description=(description or "").strip(), **options)
        if recipe:
            self.usage = "%(prog)s --config=RECIPE[:ARGUMENT] [--config.NAME=VALUE ...] [options]"
            self.add_argument(
                "--config", metavar="RECIPE[:ARGUMENT]", help="a recipe's file, or the name of one in configs/"
            )
            self.epilog = "Every field of the recipe is a flag too: --config.finetune.optimizer.lr=1e-5, for example."

        if verb in COMPILING_VERBS:
            self.add_argument(
                CACHE_FLAG,
                action=_Nothing,
                default=argparse.SUPPRESS,
                metavar="DIR|off",
                help="where compiled programs are kept for the next start (default: $JAX_COMPILATION_CACHE_DIR, or "
                "~/.cache/saisa_jax/xla); off: nowhere",
            )

    def add_switch(self, name: str, default: bool, help: str) -> None:
        """`--name` and `--noname`, as absl spells them."""
        help = f"{help} (default: {'yes' if default else 'no'})"
        self.add_argument(f"--{name}", f"--no{name}", action=_Switch, dest=name, default=default, help=help)

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]  (argparse has overloads)
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        words = sys.argv[1:] if args is None else list(args)
        flags = [flag for action in self._actions for flag in action.option_strings]
        # Before argparse looks: it would only say which required flags are missing.
        for name in (word.split("=")[0] for word in itertools.takewhile("--".__ne__, words) if word.startswith("--")):
            if name not in flags and (hint := did_you_mean(name, flags, n=3)):
                self.error(f"there is no {name}{hint}")
        return super().parse_known_args(words, namespace)

    def parse_recipe(self, args: Sequence[str]) -> tuple[argparse.Namespace, Config]:
        """The flags, and the configuration that `--config` and `--config.a.b=v` describe.

        Raises:
          ConfigError: the recipe or a setting cannot be used.
        """
        from saisa_jax.cli.flags import read_config  # --help needs no recipe

        settings: list[str] = []
        others: list[str] = []
        words = list(args)
        while words:
            word = words.pop(0)
            if not word.startswith(("--config.", "--noconfig.")):
                others.append(word)
                continue
            settings.append(word)
            if "=" not in word and words and not words[0].startswith("--"):
                settings.append(words.pop(0))
        options = self.parse_args(others)
        recipe = [] if options.config is None else [f"--config={options.config}"]
        return options, read_config([*recipe, *settings])


def layer_numbers(text: str) -> tuple[int, ...]:
    """A flag's list of layers, `0,1,7`.

    Raises:
      ArgumentTypeError: something else.
    """
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers like 0,1,7") from None


def cache_choice(args: Sequence[str]) -> str:
    """What a command line says of `--compilation_cache`; "" if nothing. To be read before jax is imported."""
    flag = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    flag.add_argument(CACHE_FLAG, default="")
    flag.add_argument("--topology")
    try:
        found = flag.parse_known_args(args)[0]
        return OFF if found.topology else found.compilation_cache  # programs for devices elsewhere cannot be read back
    except argparse.ArgumentError:  # no value: the verb's own parser says so
        return ""


class _Nothing(argparse.Action):
    """Takes a flag that `cache_choice` has read."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        del parser, namespace, values, option_string


class _Switch(argparse.Action):
    """Stores whether the flag was given without "no"."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        del parser, values
        setattr(namespace, self.dest, option_string == self.option_strings[0])
