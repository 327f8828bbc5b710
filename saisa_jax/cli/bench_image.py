"""`python -m saisa_jax bench image`: what a first and a second question about a picture cost, and a compilation."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence

import jax
from etils import epath
from rich.console import Console
from rich.table import Table

from saisa_jax.bench import image
from saisa_jax.cli.parser import Parser
from saisa_jax.config import ConfigError
from saisa_jax.inference.model import load


def main(argv: Sequence[str]) -> int:
    """The verb `bench image`.

    Raises:
      ConfigError, CheckpointError, DataError: a flag is wrong, or the model cannot be loaded.
    """
    parser = Parser("bench image", image.__doc__)
    parser.add_argument("--checkpoint", required=True, help="a finished model")
    parser.add_argument("--repeat", type=int, default=20, help="pairs of questions (default 20)")
    parser.add_argument("--question", default=image.QUESTION, help="about every picture")
    parser.add_argument("--output", help="a JSON file for the times; `report` reads WORKDIR/bench_image.json")
    flags = parser.parse_args(argv)
    if flags.repeat < 1:
        raise ConfigError(f"--repeat={flags.repeat} must be at least 1")
    model = load(flags.checkpoint)
    before = os.getloadavg()[0]
    times = image.bench(model, flags.repeat, flags.question)
    if flags.output:
        machine = {"device": jax.devices()[0].device_kind, "cores": os.cpu_count()}
        load_averages = {"load_before": before, "load_after": os.getloadavg()[0]}
        record = {"checkpoint": flags.checkpoint, "question": flags.question} | machine | load_averages | times
        epath.Path(flags.output).write_text(json.dumps(record, indent=1) + "\n")
    table = Table(title=f"prefill of {model.config.name} ({model.model_config.alignment}), median of {flags.repeat}")
    for name in ("", "ms", "of a first question"):
        table.add_column(name, justify="right" if name else "left")
    first = statistics.median(times["first"])
    for name, value in (
        ("a first question about an image", first),
        ("a second one", statistics.median(times["second"])),
        ("with a compilation for a new bucket", times["compile"]),
        ("the same bucket again", times["reuse"]),
    ):
        table.add_row(name, f"{1e3 * value:.1f}", f"{value / first:.2f}")
    console = Console()
    console.print(table)
    cache = model.image_cache
    if len(cache):
        console.print(f"An image's keys and values take {cache.nbytes / len(cache) / 2**10:,.0f} KiB.", highlight=False)
    return 0
