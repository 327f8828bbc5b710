"""`python -m saisa_jax bench step`: the time of a training step of SAISA, NAAViT and LLaVA on this machine."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import jax
from rich.console import Console

from saisa_jax.bench import step
from saisa_jax.cli.parser import Parser
from saisa_jax.config import ConfigError


def main(argv: Sequence[str]) -> int:
    """The verb `bench step`."""
    parser = Parser("bench step", step.__doc__)
    for name, value, meaning in (
        ("layers", 4, "of the decoder, and of the encoder"),
        ("embed", 512, "width of the decoder, in heads of 64"),
        ("mlp", 1408, "width of its MLP"),
        ("vocab", 8192, "tokens"),
        ("visual", 576, "visual tokens of an image, a square number"),
        ("images", 1, "of a row"),
        ("text", 96, "text tokens of a row"),
        ("rows", 4, "of a step, over all devices"),
        ("repeat", 15, "rounds"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{meaning} (default {value})")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of activations: float32 (default) or bfloat16",
    )
    parser.add_argument("--attention", default="auto", help="model.attention_impl (default auto)")
    options = parser.parse_args(argv)
    check(options)
    before = os.getloadavg()[0]
    timed = step.bench(options)
    console = Console(highlight=False, soft_wrap=True)
    devices = jax.devices()
    console.print(
        f"{options.rows} row(s) of {options.images} x {options.visual} visual and {options.text} text tokens, "
        f"{options.layers} layers x {options.embed}, {options.dtype}, on {len(devices)} x {devices[0].device_kind}; "
        f"medians of {options.repeat} rounds"
    )
    console.print(step.table(timed))
    console.print(f"Load of the machine ({os.cpu_count()} cores): {before:.1f} before, {os.getloadavg()[0]:.1f} after.")
    return 0


def check(options: argparse.Namespace) -> None:
    for name in ("layers", "mlp", "vocab", "images", "text", "rows", "repeat"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name}={getattr(options, name)} must be at least 1")
    if options.embed < 64 or options.embed % 64:
        raise ConfigError(f"--embed={options.embed} is not a multiple of 64, the width of a head")
    if options.visual < 1 or round(options.visual**0.5) ** 2 != options.visual:
        raise ConfigError(f"--visual={options.visual} is no square number: an image has as many patches each way")
