"""`python -m saisa_jax flops`: what a prompt costs under each alignment, side by side.

python -m saisa_jax flops --model=vicuna-7b --vision=clip-vit-l-336 --text=64

With several numbers of images (`--images=1,2,3,4,5`: of image slots, as the views of any resolution take them) how the
cost grows with them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

import jax
from rich.console import Console
from rich.table import Table

from saisa_jax import flops, presets
from saisa_jax.cli.parser import Parser
from saisa_jax.config import ConfigError, ModelConfig

NAMES = {"llava": "LLaVA", "naavit": "NAAViT", "saisa": "SAISA", "flamingo": "Flamingo"}
CONVENTIONS = {
    "paper": "authors' convention",
    "decoder": "+ projector before layer 1",
    "end_to_end": "+ vision and head = all",
}


def layer_table(configs: Mapping[str, ModelConfig], text: int, images: int = 1) -> Table:
    """What one decoder layer that sees the image costs, by part; under Flamingo with the cross layer before it."""
    layers = {name: flops.layer(config, text, images) for name, config in configs.items()}
    unit, scale = _unit(layer.total for layer in layers.values())
    table = _new_table(f"One decoder layer ({unit})", configs)
    parts = (part for part in flops.PARTS if any(layer.parts[part] for layer in layers.values()))
    for part in (*parts, "total"):
        table.add_row(part, *(_number(getattr(layer, part) / scale) for layer in layers.values()))
    return table


def total_table(configs: Mapping[str, ModelConfig], text: int, images: int, by_xla: Mapping[str, float]) -> Table:
    """What reading a prompt costs: by part, summed in the three conventions of `flops.CONVENTIONS`, and as XLA counts.

    Args:
      configs: by alignment; reductions are relative to the first.
      text: text tokens of the prompt.
      images: its images.
      by_xla: `flops.xla_prefill` of each.
    """
    totals = {name: flops.prefill(config, text, images) for name, config in configs.items()}
    unit, scale = _unit(total.total for total in totals.values())
    table = _new_table(f"Prefill of the whole model ({unit})", configs)
    for part in (part for part in flops.PARTS if any(total.parts[part] for total in totals.values())):
        table.add_row(part, *(_number(getattr(total, part) / scale) for total in totals.values()))
    table.add_section()
    for convention, title in CONVENTIONS.items():
        sums = [flops.prefill(config, text, images, convention=convention).total for config in configs.values()]
        table.add_row(title, *_with_reductions(sums, scale))
    table.add_section()
    table.add_row("all, as XLA counts it", *_with_reductions(list(by_xla.values()), scale))
    table.add_row("XLA's count / ours", *(f"{by_xla[name] / total.total:.3f}" for name, total in totals.items()))
    return table


def growth_table(configs: Mapping[str, ModelConfig], text: int, images: Sequence[int], convention: str) -> Table:
    """What reading a prompt costs with more and more images, in one of the conventions of `flops.CONVENTIONS`."""
    totals = [
        [flops.prefill(config, text, count, convention=convention).total for config in configs.values()]
        for count in images
    ]
    unit, scale = _unit([max(map(max, totals))])
    table = Table(title=f"Prefill by visual tokens, {convention} ({unit})", title_justify="left")
    for name in ("images", "visual tokens", *map(NAMES.__getitem__, configs)):
        table.add_column(name, justify="right")
    for count, sums in zip(images, totals, strict=True):
        visual = count * next(iter(configs.values())).num_visual_tokens
        table.add_row(str(count), f"{visual:,}", *_with_reductions(sums, scale))
    return table


def _new_table(title: str, configs: Mapping[str, ModelConfig]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in configs:
        table.add_column(NAMES[name], justify="right")
    return table


def _unit(values: Iterable[float]) -> tuple[str, float]:
    largest = max(values)
    return next(
        ((unit, size) for unit, size in (("TFLOPs", 1e12), ("GFLOPs", 1e9)) if largest >= size), ("MFLOPs", 1e6)
    )


def _number(value: float) -> str:
    return "-" if value == 0 else f"{value:.3f}" if value >= 0.001 else f"{value:.1g}"


def _with_reductions(values: Sequence[float], scale: float) -> list[str]:
    first, *others = (f"{value / scale:.3f}" for value in values)
    return [first, *(f"{text} ({value / values[0] - 1:+.1%})" for text, value in zip(others, values[1:], strict=True))]


def main(argv: Sequence[str]) -> int:
    """The verb `flops`.

    Raises:
      ConfigError: an unknown model or encoder, or numbers that make no prompt.
    """
    parser = Parser("flops", "what the alignments cost")
    parser.add_argument("--model", default="vicuna-7b", help=", ".join(presets.LLMS))
    parser.add_argument("--vision", default="clip-vit-l-336", help=", ".join(presets.VISIONS))
    parser.add_argument("--text", type=int, default=64, help="text tokens of the prompt (default 64, the authors')")
    parser.add_argument("--images", default="1", help="image slots of the prompt, or several numbers (default 1)")
    args = parser.parse_args(argv)
    images = [int(number) if number.isdecimal() else -1 for number in args.images.split(",")]
    if args.text < 1 or min(images) < 0:
        raise ConfigError(f"--text={args.text} must be at least 1 and --images={args.images} at least 0")

    jax.config.update("jax_platforms", "cpu")  # only shapes are computed: leave accelerators alone
    configs = {name: presets.make(args.model, args.vision, alignment=name) for name in NAMES}
    console, start = Console(width=max(Console().width, 100)), time.perf_counter()  # four columns of numbers
    if len(images) > 1:
        console.print(f"{args.model}, {args.vision}: {args.text} text tokens")
        for convention in ("decoder", "end_to_end"):
            console.print(growth_table(configs, args.text, images, convention))
    else:
        visual = images[0] * presets.VISIONS[args.vision].num_patches
        console.print(f"{args.model}, {args.vision}: {args.text} text and {visual} visual tokens")
        console.print(layer_table(configs, args.text, images[0]))
        by_xla = {name: flops.xla_prefill(config, args.text, images[0]) for name, config in configs.items()}
        console.print(total_table(configs, args.text, images[0], by_xla))
    seconds = time.perf_counter() - start
    console.print(f"Counted in the model's own prefill, traced with abstract arrays (no weights), in {seconds:.1f} s.")
    console.print("Products of matrices alone are counted; XLA counts element-wise arithmetic as well.")
    return 0
