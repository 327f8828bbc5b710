"""The parser of the verbs: a flag that does not exist is answered with the nearest ones."""

from __future__ import annotations

import argparse
import difflib
import itertools
import sys
from collections.abc import Sequence
from typing import Any


class Parser(argparse.ArgumentParser):
    """Answers a flag that does not exist with the nearest ones."""

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]  (argparse has overloads)
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        words = sys.argv[1:] if args is None else list(args)
        flags = [flag for action in self._actions for flag in action.option_strings]
        # Before argparse looks: it would only say which required flags are missing.
        for name in (word.split("=")[0] for word in itertools.takewhile("--".__ne__, words) if word.startswith("--")):
            near = difflib.get_close_matches(name, flags, n=3)
            if near and not any(flag.startswith(name) for flag in flags):  # argparse takes a beginning for the whole
                self.error(f"there is no {name}; did you mean {' or '.join(near)}?")
        return super().parse_known_args(words, namespace)
