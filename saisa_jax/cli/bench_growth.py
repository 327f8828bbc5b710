"""`python -m saisa_jax bench growth`: time and memory as visual tokens and pictures become more."""

from __future__ import annotations

import json
from collections.abc import Sequence

from saisa_jax.bench import growth
from saisa_jax.bench.sizes import SIZES
from saisa_jax.bench.times import measure_machine, why_busy
from saisa_jax.cli.lists import DTYPES, choices, numbers, output_folder, wide_console
from saisa_jax.cli.parser import Parser
from saisa_jax.config import ALIGNMENTS, ConfigError


def main(argv: Sequence[str]) -> int:
    """The verb `bench growth`.

    Raises:
      ConfigError: a flag is wrong.
    """
    parser = Parser("bench growth", growth.__doc__)
    parser.add_argument("--size", default="mid", choices=tuple(SIZES), help="of the decoder (default mid)")
    parser.add_argument("--alignments", default=",".join(ALIGNMENTS), help="which (default all)")
    parser.add_argument("--tokens", default="64,144,256,576,1024,2304,4624", help="of one picture, square numbers")
    parser.add_argument(
        "--images", default="2,4,8", help="pictures, of as many tokens as the size says (default 2,4,8)"
    )
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of parameters and activations")
    parser.add_argument("--repeat", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--output", help="a folder for growth.json, growth.md and growth.png")
    flags = parser.parse_args(argv)
    size, alignments = SIZES[flags.size], choices("alignments", flags.alignments, ALIGNMENTS)
    shapes = [(1, tokens) for tokens in numbers("tokens", flags.tokens)]
    odd = [tokens for _, tokens in shapes if round(tokens**0.5) ** 2 != tokens]
    if odd:
        raise ConfigError(
            f"--tokens={flags.tokens}: {odd[0]} is no square number: an image has as many patches each way"
        )
    if flags.repeat < 1:
        raise ConfigError(f"--repeat={flags.repeat} must be at least 1")
    shapes += [(images, size.visual) for images in numbers("images", flags.images)]
    folder = output_folder(flags.output)
    console, machine = wide_console(), measure_machine(flags.dtype)
    points: list[growth.Point] = []
    for point in growth.bench(size, alignments, shapes, flags.dtype, flags.repeat):
        points.append(point)
        console.print(f"{len(points)} of {len(shapes) + 1} shapes", style="dim")
    table = growth.grid(points)
    console.print(table)
    busy = why_busy(machine, [point.watch for point in points])
    says = f"Nothing is concluded from wall times: {busy}." if busy else "The machine was quiet."
    console.print(says)
    if folder is not None:
        (folder / "growth.json").write_text(json.dumps(growth.record(points), indent=1) + "\n")
        (folder / "growth.md").write_text(table.markdown() + "\n" + says + "\n")
        (folder / "growth.png").write_bytes(growth.figure(points, bool(busy)))
    return 0
