"""`python -m saisa_jax bench serve`: requests and tokens a second of a server, and the time to a first token."""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax
from rich.console import Console
from rich.table import Table

from saisa_jax.bench import serve
from saisa_jax.cli import devices
from saisa_jax.cli.parser import Parser
from saisa_jax.config import ConfigError
from saisa_jax.inference.model import load


def main(argv: Sequence[str]) -> int:
    """The verb `bench serve`.

    Raises:
      ConfigError, CheckpointError, DataError: a flag is wrong, or the model cannot be loaded or is not served.
    """
    parser = Parser("bench serve", serve.__doc__)
    parser.add_argument("--checkpoint", required=True, help="a finished model")
    parser.add_argument("--clients", default="1,8,64", help="numbers of clients (default 1,8,64)")
    for name, default, about in (
        ("rows", 8, "questions that are answered at once"),
        ("requests", 64, "of each load, at least two of each client"),
        ("tokens", 32, "of an answer"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{about} (default {default})")
    devices.add_model_flags(parser)
    flags = parser.parse_args(argv)
    for name in ("rows", "requests", "tokens"):
        if getattr(flags, name) < 1:
            raise ConfigError(f"--{name}={getattr(flags, name)} must be at least 1")
    try:
        clients = [int(count) for count in flags.clients.split(",")]
    except ValueError as error:
        raise ConfigError(f"--clients={flags.clients} is not a list of numbers, as 1,8,64") from error
    if min(clients) < 1:
        raise ConfigError(f"--clients={flags.clients}: each must be at least 1")
    model = load(flags.checkpoint, **devices.placed(flags))
    device = jax.devices()[0].device_kind
    table = Table(
        title=f"{model.config.name}, {flags.rows} rows, answers of {flags.tokens} tokens, on {device}",
        caption="one by one: without a server; ratio: requests/s against it; first: the first token",
    )
    for name in ("clients", "questions about", "requests/s", "tokens/s", "ratio", "first, ms", "p95"):
        table.add_column(name, justify="left" if name == "questions about" else "right", no_wrap=True)
    before, alone = os.getloadavg()[0], 1.0
    for each in serve.bench(
        model, clients, rows=flags.rows, requests=flags.requests, tokens=flags.tokens
    ):  # fmt: skip
        alone = each.requests if not each.clients else alone
        waits = [f"{1e3 * wait:.0f}" if each.clients else "" for wait in (each.first, each.slowest)]
        name = str(each.clients) if each.clients else "one by one"
        numbers = f"{each.requests:.2f}", f"{each.tokens:.1f}", f"{each.requests / alone:.2f}"
        table.add_row(name, each.pictures, *numbers, *waits, end_section=each.clients == clients[-1])
    console = Console(highlight=False)
    console.print(table)
    console.print(f"Load of the machine ({os.cpu_count()} cores): {before:.1f} before, {os.getloadavg()[0]:.1f} after.")
    return 0
