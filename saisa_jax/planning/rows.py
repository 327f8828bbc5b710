"""`python -m saisa_jax rows`: which rows, of T text tokens and M image slots, cost least for a stage's samples.

A step computes whole rows: padding and empty image slots cost what full ones do (an empty slot goes through vision
encoder, projectors, keys and values). So the cheapest (T, M) is the one that costs least in executed FLOPs per sample,
everything included; long rows fill better and attend over more that is masked.

Without the sources of the recipe, `--lengths=llava-pretrain` and `--lengths=llava-finetune` stand for the paper's data.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float64
from rich.console import Console
from rich.table import Table

from saisa_jax import flops
from saisa_jax.cli.flags import read_config
from saisa_jax.config import STAGES, Config, ConfigError
from saisa_jax.data.pipeline import stage_counts
from saisa_jax.data.rows.packing import pack
from saisa_jax.data.sample import DataError
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.planning.lengths import LENGTHS, Counts, some
from saisa_jax.planning.tables import console

TEXT_LENGTHS = (128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 2048)
SLOTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 24, 32)
SAMPLES_PER_STEP = {"pretrain": 256, "finetune": 128}  # the paper's
SHOWN = 12
MAX_CUT = 0.01  # shapes that cut a larger share of the text are another training, and are not shown


@dataclasses.dataclass(frozen=True)
class Choice:
    """What rows of one shape do with the samples."""

    text_length: int
    max_images: int
    rows: int
    samples: int
    token_fill: float  # shares, 0..1
    image_fill: float
    cut: float  # tokens of samples longer than a row, of all tokens
    useful: float  # FLOPs that the samples need, as long as they are kept, of those that are executed
    flops_per_sample: float  # executed, forward and backward


def main(argv: Sequence[str]) -> int:
    """The verb; 2 if the data cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m saisa_jax rows", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --config=RECIPE[:ARGUMENT] [--config.NAME=VALUE ...] [options]",
    )  # fmt: skip
    parser.add_argument("--stage", choices=STAGES, default="finetune", help="default: finetune")
    parser.add_argument("--lengths", choices=sorted(LENGTHS), help="stand-ins for the recipe's sources")
    options, rest = parser.parse_known_args(argv)
    config = read_config(rest)
    try:
        counts = (
            LENGTHS[options.lengths]()
            if options.lengths
            else stage_counts(config, options.stage, load_tokenizer(config.data.tokenizer))
        )
    except DataError as error:
        Console(stderr=True).print(f"rows: {error}", style="red", highlight=False)
        return 2
    choices = compare(config, options.stage, counts)
    console().print(table(choices, SAMPLES_PER_STEP[options.stage]))
    return 0


def compare(config: Config, stage: str, counts: Counts) -> list[Choice]:
    """Every legal shape of rows, the cheapest first; the recipe's own is among them.

    Args:
      config: the run's.
      stage: pretrain or finetune; its model and who trains say what a row costs.
      counts: of the samples, in any order.

    Raises:
      ConfigError: there are no samples.
    """
    if not len(counts[0]):
        raise ConfigError(f"{stage}.sources: no sample can be used")
    tokens, images = some(counts)
    settings = config.stage(stage)
    shapes = {(t, m) for t in TEXT_LENGTHS for m in SLOTS} | {(settings.text_length, settings.max_images)}
    found = []
    for text_length, max_images in sorted(shapes):
        if max_images < images.max() or not 0.5 < _balance(tokens, images, text_length, max_images) < 2:
            continue
        kept = np.minimum(tokens, text_length)
        cut = 1 - kept.sum() / tokens.sum()
        if cut > MAX_CUT:
            continue
        plan = pack(kept, images, text_length, max_images, [0])
        executed = len(plan) * row_flops(config, stage, text_length, max_images)
        found.append(
            Choice(
                text_length,
                max_images,
                len(plan),
                len(tokens),
                float(kept.sum() / (len(plan) * text_length)),
                float(images.sum() / (len(plan) * max_images)),
                float(cut),
                float(sample_flops(config, stage, (kept, images)).sum() / executed),
                executed / len(tokens),
            )
        )
    return sorted(found, key=lambda choice: choice.flops_per_sample)


def _balance(tokens: np.ndarray, images: np.ndarray, text_length: int, max_images: int) -> float:
    """How many times as fast a row runs out of text as of slots; far from 1 one of them stays empty."""
    text, slots = np.minimum(tokens, text_length).mean() / text_length, images.mean() / max(max_images, 1)
    return float(text / slots) if slots else 1.0


@lru_cache(maxsize=4096)
def row_flops(config: Config, stage: str, text_length: int, max_images: int) -> float:
    """Forward and backward of one row, as the stage trains."""
    return flops.train_step(config.model_for(stage), config.stage(stage).groups, 1, text_length, max_images)


def sample_flops(config: Config, stage: str, counts: Counts) -> Float64[np.ndarray, " n"]:
    """What each sample costs in a row of exactly its size."""
    tokens, images = counts
    total = np.zeros(len(tokens))
    for number in np.unique(images):
        chosen = images == number
        # For a number of images, the cost is a polynomial of second degree in the text (attention).
        places = np.array([1, 512, 1024])
        costs = [row_flops(config, stage, int(place), int(number)) for place in places]
        total[chosen] = np.polyval(np.polyfit(places, costs, 2), tokens[chosen])
    return total


def table(choices: Sequence[Choice], samples_per_step: int) -> Table:
    """The cheapest shapes, and how many rows make a step of so many samples."""
    shown = Table(
        "T", "M", "samples/row", "token fill", "image fill", "cut", "useful FLOPs", "TFLOPs/sample", "rows/step"
    )
    for choice in choices[:SHOWN]:
        per_row = choice.samples / choice.rows
        shown.add_row(
            str(choice.text_length),
            str(choice.max_images),
            f"{per_row:.2f}",
            f"{choice.token_fill:.1%}",
            f"{choice.image_fill:.1%}",
            f"{choice.cut:.1%}",
            f"{choice.useful:.1%}",
            f"{choice.flops_per_sample / 1e12:.3f}",
            f"{samples_per_step / per_row:.1f}",
        )
    return shown
