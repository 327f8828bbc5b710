"""`python -m saisa_jax bench image|data`: what a question about a picture costs; what the data pipeline delivers."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

BENCHES = {
    "image": ("saisa_jax.bench.image", "a first and a second question about a picture, and a compilation"),
    "data": ("saisa_jax.bench.data", "images a second of a core, beside PIL with transformers' processor alone"),
}


def main(argv: Sequence[str]) -> int:
    """The verb `bench`; the status of what it runs."""
    parser = argparse.ArgumentParser(
        prog="python -m saisa_jax bench",
        description="\n".join(f"{name:<6} {about}" for name, (_, about) in BENCHES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=BENCHES, help="--help after it tells its options")
    options = parser.parse_args(argv[:1])
    return importlib.import_module(BENCHES[options.what][0]).main(argv[1:])
