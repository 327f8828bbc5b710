"""`python -m saisa_jax bench image|step|data`: what a question, a training step and an image of a batch cost."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

BENCHES = {
    "image": ("saisa_jax.bench.image", "a first and a second question about a picture, and a compilation"),
    "step": ("saisa_jax.bench.step", "a training step under SAISA, NAAViT and LLaVA"),
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
