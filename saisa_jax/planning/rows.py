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
from jaxtyping import Float64, Int32
from rich.console import Console
from rich.table import Table

from saisa_jax.config import STAGES, Config, ConfigError
from saisa_jax.config.command_line import read_config
from saisa_jax.data.pipeline import stage_counts
from saisa_jax.data.plan import WINDOW, pack
from saisa_jax.data.sample import DataError
from saisa_jax.data.tokenizer import load_tokenizer
from saisa_jax.models import flops

Counts = tuple[Int32[np.ndarray, " n"], Int32[np.ndarray, " n"]]  # text tokens and images of each sample

TEXT_LENGTHS = (128, 256, 384, 512, 768, 1024, 1280, 1536, 2048)
SLOTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
SAMPLES_PER_STEP = {"pretrain": 256, "finetune": 128}  # the paper's
SHOWN = 12
ENOUGH = 4 * WINDOW  # samples that are packed, of however many: shares come out within a few tenths of a percent


@dataclasses.dataclass(frozen=True)
class Choice:
    """What rows of one shape do with the samples."""

    text_length: int
    max_images: int
    rows: int
    samples: int
    token_fill: float  # shares, 0..1
    image_fill: float
    useful: float  # FLOPs that the samples need, of those that are executed
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
    console = Console()
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
    console.print(table(choices, SAMPLES_PER_STEP[options.stage]))
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
    chosen = np.random.default_rng(0).permutation(len(counts[0]))[:ENOUGH]
    tokens, images = counts[0][chosen], counts[1][chosen]
    settings = config.stage(stage)
    needed = sample_flops(config, stage, (tokens, images)).sum()
    shapes = {(t, m) for t in TEXT_LENGTHS for m in SLOTS} | {(settings.text_length, settings.max_images)}
    found = []
    for text_length, max_images in sorted(shapes):
        if max_images < images.max() or not 0.5 < _balance(tokens, images, text_length, max_images) < 2:
            continue
        plan = pack(np.minimum(tokens, text_length), images, text_length, max_images, [0])
        executed = len(plan) * row_flops(config, stage, text_length, max_images)
        found.append(
            Choice(
                text_length,
                max_images,
                len(plan),
                len(tokens),
                float(np.minimum(tokens, text_length).sum() / (len(plan) * text_length)),
                float(images.sum() / (len(plan) * max_images)),
                float(needed / executed) if tokens.max() <= text_length else float("nan"),  # a cut sample needs less
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
    shown = Table("T", "M", "samples/row", "token fill", "image fill", "useful FLOPs", "TFLOPs/sample", "rows/step")
    for choice in choices[:SHOWN]:
        per_row = choice.samples / choice.rows
        shown.add_row(
            str(choice.text_length),
            str(choice.max_images),
            f"{per_row:.2f}",
            f"{choice.token_fill:.1%}",
            f"{choice.image_fill:.1%}",
            f"{choice.useful:.1%}",
            f"{choice.flops_per_sample / 1e12:.3f}",
            f"{samples_per_step / per_row:.1f}",
        )
    return shown


# --- Lengths like the paper's data -----------------------------------------------------------------------------------


def llava_pretrain(samples: int = 558_128, seed: int = 0) -> Counts:
    """One image and a caption: 10 to 60 text tokens, mostly about 20."""
    rng = np.random.default_rng(seed)
    tokens = np.clip(np.round(rng.lognormal(np.log(20), 0.35, samples)), 10, 60)
    return tokens.astype(np.int32), np.ones(samples, np.int32)


def llava_finetune(samples: int = 665_298, text_only: int = 40_688, seed: int = 0) -> Counts:
    """One image and 30 to 600 text tokens, short ones more often than long ones; and text alone, long-tailed."""
    rng = np.random.default_rng(seed)
    with_image = np.exp(rng.uniform(np.log(30), np.log(600), samples - text_only))
    alone = np.clip(rng.lognormal(np.log(700), 0.9, text_only), 30, 2048)
    tokens = np.round(np.concatenate([with_image, alone])).astype(np.int32)
    images = np.repeat(np.array([1, 0], np.int32), [samples - text_only, text_only])
    order = rng.permutation(samples)
    return tokens[order], images[order]


LENGTHS = {"llava-pretrain": llava_pretrain, "llava-finetune": llava_finetune}
