"""`python -m saisa_jax bench parts`: each part of a question and of a step against what this machine can do."""

from __future__ import annotations

import json
from collections.abc import Sequence

from saisa_jax.bench import parts
from saisa_jax.bench.peers_report import describe
from saisa_jax.bench.sizes import SIZES
from saisa_jax.bench.times import measure_machine, why_busy
from saisa_jax.cli.lists import DTYPES, choices, output_folder, wide_console
from saisa_jax.cli.parser import Parser
from saisa_jax.config import ALIGNMENTS, ConfigError


def main(argv: Sequence[str]) -> int:
    """The verb `bench parts`.

    Raises:
      ConfigError: a flag is wrong.
    """
    parser = Parser("bench parts", parts.__doc__)
    parser.add_argument("--size", default="mid", choices=tuple(SIZES), help="of the model (default mid)")
    parser.add_argument("--alignments", default="saisa,llava", help="which (default saisa,llava)")
    parser.add_argument("--programs", default=",".join(parts.PROGRAMS), help="of prefill, decode, gradient (all)")
    parser.add_argument("--rows", type=int, default=1, help="questions at once (default 1)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of parameters and activations")
    parser.add_argument("--repeat", type=int, default=5, help="calls of each program (default 5)")
    parser.add_argument("--output", help="a folder for parts.json and parts.md")
    flags = parser.parse_args(argv)
    alignments = choices("alignments", flags.alignments, ALIGNMENTS)
    programs = choices("programs", flags.programs, parts.PROGRAMS)
    if flags.rows < 1 or flags.repeat < 1:
        raise ConfigError(f"--rows={flags.rows} and --repeat={flags.repeat} must be at least 1")
    folder, console = output_folder(flags.output), wide_console()
    machine = measure_machine(flags.dtype)
    lines, records, watched = [describe(machine, flags.dtype) + "\n"], [], []
    console.print(lines[0])
    for alignment in alignments:
        for taken in parts.bench(SIZES[flags.size], alignment, programs, flags.rows, flags.dtype, flags.repeat):
            table = parts.grid(taken, machine)
            console.print(table)
            lines.append(table.markdown())
            records.append(parts.record(taken, machine))
            watched.append(taken.watch)
    if busy := why_busy(machine, watched):
        lines.append(f"Nothing is concluded: {busy}.\n")
        console.print(lines[-1])
    if folder is not None:
        (folder / "parts.json").write_text(json.dumps(records, indent=1) + "\n")
        (folder / "parts.md").write_text("\n".join(lines))
    return 0
