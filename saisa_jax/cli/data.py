"""`python -m saisa_jax data`: what becomes of a recipe's data, and sets that are ready to be read.

python -m saisa_jax data prepare --config=RECIPE[:argument] --stage=finetune --to=DIR
python -m saisa_jax data inspect --config=RECIPE[:argument] --n=3
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from saisa_jax.data.sample import DataError

ACTIONS = {
    "prepare": ("saisa_jax.data.prepare", "samples of any source -> checked ArrayRecord shards with an index"),
    "inspect": ("saisa_jax.cli.data_inspect", "a batch as it is trained on: supervised text, images, how full it is"),
}


def main(argv: Sequence[str]) -> int:
    """The verb `data`; 2 and one message if a source, a sample or a configuration cannot be used."""
    lines = (f"  {name:<8} {about}" for name, (_, about) in ACTIONS.items())
    usage = "\n".join(["usage: python -m saisa_jax data ACTION [--help] ...", "", "actions:", *lines])
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0 if argv else 2
    action, *rest = argv
    if action not in ACTIONS:
        near = difflib.get_close_matches(action, ACTIONS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"data: unknown action {action!r}{hint}\n\n{usage}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(ACTIONS[action][0]).main(rest) or 0
    except (DataError, OSError) as error:
        print(f"data {action}: {error}", file=sys.stderr)
        return 2
