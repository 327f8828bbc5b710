"""`python -m saisa_jax VERB ...`: everything besides training (`train.py`) and evaluation (`eval.py`)."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from saisa_jax.cli.process import quiet_libraries
from saisa_jax.errors import UserError

# A verb's module is imported only when it is called; its `main(argv)` returns an exit status.
VERBS = {
    "bench": ("saisa_jax.cli.bench", "what a question about a picture costs, and what the data pipeline delivers"),
    "chat": ("saisa_jax.cli.chat", "a conversation with a finished model about pictures"),
    "convert": ("saisa_jax.cli.convert", "weights in, weights out: Hugging Face, GGUF, LLaVA, the official SAISA"),
    "data": ("saisa_jax.cli.data", "a recipe's data: `prepare` it as checked shards, `inspect` a batch"),
    "flops": ("saisa_jax.cli.flops", "what a prompt costs under LLaVA, NAAViT and SAISA"),
    "plan": ("saisa_jax.cli.plan", "whether a recipe fits accelerators that are not here, and what it costs"),
    "report": ("saisa_jax.report.build", "the HTML page and the plots of finished runs"),
    "rows": ("saisa_jax.cli.rows", "which rows, of how many text tokens and images, cost least for the data"),
}


def usage() -> str:
    lines = (f"  {verb:<8} {about}" for verb, (_, about) in VERBS.items())
    return "\n".join(["usage: python -m saisa_jax VERB [--help] ...", "", "verbs:", *lines])


def main(argv: Sequence[str]) -> int:
    """Runs a verb; 2 and one line if there is no such verb, or if it cannot do what it is told."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    verb, *rest = argv
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"unknown verb {verb!r}{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(VERBS[verb][0]).main(rest) or 0
    except (UserError, OSError) as error:
        print(f"{verb}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(main(sys.argv[1:]))
