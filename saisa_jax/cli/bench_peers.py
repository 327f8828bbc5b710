"""`python -m saisa_jax bench peers`: SAISA and LLaVA beside the same models in PyTorch."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence

from saisa_jax.bench import peers, peers_report
from saisa_jax.bench.sizes import SIZES
from saisa_jax.bench.times import Machine, measure_machine, why_busy
from saisa_jax.cli.lists import DTYPES, choices, numbers, output_folder, wide_console
from saisa_jax.cli.parser import Parser
from saisa_jax.config import ConfigError


def main(argv: Sequence[str]) -> int:
    """The verb `bench peers`.

    Raises:
      ConfigError: a flag is wrong, or torch is not installed.
      DisagreeError: two programs that are compared do not compute the same.
    """
    parser = Parser("bench peers", peers.__doc__)
    parser.add_argument("--sizes", default="mid", help=f"of {', '.join(SIZES)} (default mid)")
    parser.add_argument("--rows", default="1", help="questions at once, for example 1,8 (default 1)")
    parser.add_argument("--dtypes", default="float32", help="of float32, bfloat16 (default float32)")
    parser.add_argument("--measures", default=",".join(peers.MEASURES), help="of prefill, second, decode, train (all)")
    parser.add_argument(
        "--runtimes", default="eager,compile", help="of PyTorch: eager, compile; or none (default eager,compile)"
    )
    parser.add_argument("--repeat", type=int, default=9, help="rounds (default 9)")
    parser.add_argument("--attention", default="auto", help="model.attention_impl of training (default auto)")
    parser.add_argument("--output", help="a folder for peers.json, peers.md and peers.png")
    flags = parser.parse_args(argv)
    sizes, dtypes = choices("sizes", flags.sizes, SIZES), choices("dtypes", flags.dtypes, DTYPES)
    measures = choices("measures", flags.measures, peers.MEASURES)
    runtimes = [] if flags.runtimes == "none" else choices("runtimes", flags.runtimes, peers.RUNTIMES)
    cases = [
        peers.Case(size, rows, dtype) for size in sizes for rows in numbers("rows", flags.rows) for dtype in dtypes
    ]
    if flags.repeat < 1:
        raise ConfigError(f"--repeat={flags.repeat} must be at least 1")
    folder = output_folder(flags.output)
    console = wide_console()
    lines: list[str] = []

    def say(line: str) -> None:
        console.print(line)
        lines.append(line + "\n")

    in_torch = peers.peers() if runtimes else None
    if in_torch is not None:
        in_torch.device()
        if "compile" in runtimes and (because := in_torch.why_not_compiled()):
            runtimes.remove("compile")
            say(f"torch.compile does not work here and is left out: {because}")
    machines: dict[str, Machine] = {}
    for dtype in dtypes:
        machines[dtype] = measure_machine(dtype, [in_torch.product(dtype)] if in_torch is not None else [])
        say(peers_report.describe(machines[dtype], dtype))
    found: list[peers.Found] = []
    for case in cases:
        for one in peers.bench(case, measures, runtimes, flags.repeat, flags.attention):
            found.append(one)
            table = peers_report.grid(one, machines[case.dtype])
            console.print(table)
            lines.append(table.markdown())
    first = machines[dtypes[0]]
    busy = next(filter(None, (why_busy(machines[one.case.dtype], [one.watch]) for one in found)), "")
    loads = [load for one in found for load in (one.watch.load_before, one.watch.load_after)]
    others = max(one.watch.others or 0 for one in found)
    say(f"Load of a minute {min(loads):.1f} to {max(loads):.1f}; others took at most {others:.0%} of the cores' time.")
    if busy:
        say(f"Nothing is concluded: {busy}. The times are those of a busy machine; CPU times say more than wall times.")
    elif peers_report.on_cpu() and (table := peers_report.bars_grid(found, first)):
        console.print(table)
        lines.append(table.markdown())
    if folder is not None:
        names = ("jax", "jaxlib", *(("torch", "transformers") if runtimes else ()))
        versions = {name: importlib.metadata.version(name) for name in names}
        (folder / "peers.json").write_text(json.dumps(peers_report.record(found, machines, versions), indent=1) + "\n")
        (folder / "peers.md").write_text("\n".join(lines))
        (folder / "peers.png").write_bytes(peers_report.figure(found, bool(busy)))
    return 0
