"""`python -m saisa_jax data drawings`: pictures with captions and questions, made of drawings that packages hold.

python -m saisa_jax data drawings --from=runs/proof/packages --output=runs/proof/drawings

`make proof-packages` brings the packages: emoji of four artists from npm, Tux Paint's photographs from Debian.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from saisa_jax.cli.parser import Parser
from saisa_jax.data.drawings.build import Sizes, build

HELP = {
    "captions": "pictures with a caption, for stage 1",
    "train": "pictures with a conversation, for stage 2",
    "validation": "of each kind, for curves while training",
    "test": "questions of the benchmark",
    "image_size": "pixels of a side",
    "concepts": "things at most, those with a photograph first; 0: all",
    "seed": "of the choice of everything",
}


def main(argv: Sequence[str]) -> int:
    """The verb `data drawings`.

    Raises:
      DataError: a package is missing, or --output holds something else.
    """
    parser = Parser("data drawings", __doc__)
    parser.add_argument("--from", dest="packages", required=True, help="the directory of unpacked packages")
    parser.add_argument("--output", required=True, help="the set; left as it is if it is there with the same settings")
    for field in dataclasses.fields(Sizes):
        if field.name in HELP:
            about = f"{HELP[field.name]} (default: {field.default})"
            parser.add_argument(f"--{field.name}", type=int, default=field.default, help=about)
    parser.add_switch("photographs", True, "ask about photographs as well, which need the package of Tux Paint")
    args = vars(parser.parse_args(argv))
    packages, output = Path(args.pop("packages")), Path(args.pop("output"))
    started = time.perf_counter()
    record = build(packages, output, Sizes(**args))
    samples = ", ".join(f"{count:,} {name}" for name, count in record["samples"].items())
    concepts = ", ".join(f"{count} {name}" for name, count in record["concepts"].items())
    print(f"{output}: {samples}; concepts: {concepts}; in {time.perf_counter() - started:.0f} s")
    blind = ", ".join(f"{name} {share:.1%}" for name, share in record["baseline"].items())
    print(f"the most frequent answer to each question, without the picture: {blind}")
    print(f"to ask a model: python eval.py --checkpoint=CKPT --tasks=drawings --data={output}")
    return 0
