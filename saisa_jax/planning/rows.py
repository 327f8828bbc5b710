"""Which rows, of T text tokens and M image slots, cost least for a stage's samples.

A step computes whole rows: padding and empty image slots cost what full ones do (an empty slot goes through vision
encoder, projectors, keys and values). So the cheapest (T, M) is the one that costs least in executed FLOPs per sample,
everything included; long rows fill better and attend over more that is masked.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from jaxtyping import Float64
from rich.table import Table

from saisa_jax import flops
from saisa_jax.config import Config, ConfigError
from saisa_jax.data.rows.packing import pack
from saisa_jax.planning.lengths import Counts, some

TEXT_LENGTHS = (128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 2048)
SLOTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 24, 32)  # of images, each of as many views as it may have
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


def compare(config: Config, stage: str, counts: Counts) -> list[Choice]:
    """Every legal shape of rows, the cheapest first; the recipe's own is among them.

    Args:
      config: the run's.
      stage: pretrain or finetune; its model and what trains decide what a row costs.
      counts: of the samples, in any order.

    Raises:
      ConfigError: there are no samples.
    """
    if not len(counts[0]):
        raise ConfigError(f"{stage}.sources: no sample can be used")
    tokens, images = some(counts)
    settings, cost = config.stage(stage), RowCost(config, stage)
    views = config.model.vision.max_views
    shapes = {(t, m * views) for t in TEXT_LENGTHS for m in SLOTS} | {(settings.text_length, settings.max_images)}
    found = []
    for text_length, max_images in sorted(shapes):
        if max_images < images.max() or not 0.5 < _balance(tokens, images, text_length, max_images) < 2:
            continue
        kept = np.minimum(tokens, text_length)
        cut = 1 - kept.sum() / tokens.sum()
        if cut > MAX_CUT:
            continue
        plan = pack(kept, images, text_length, max_images, [0])
        executed = len(plan) * float(cost(text_length, max_images))
        found.append(
            Choice(
                text_length,
                max_images,
                len(plan),
                len(tokens),
                float(kept.sum() / (len(plan) * text_length)),
                float(images.sum() / (len(plan) * max_images)),
                float(cut),
                float(cost(kept, images).sum() / executed),
                executed / len(tokens),
            )
        )
    return sorted(found, key=lambda choice: choice.flops_per_sample)


def _balance(tokens: np.ndarray, images: np.ndarray, text_length: int, max_images: int) -> float:
    """How many times as fast a row runs out of text as of slots; far from 1 one of them stays empty."""
    text, slots = np.minimum(tokens, text_length).mean() / text_length, images.mean() / max(max_images, 1)
    return float(text / slots) if slots else 1.0


class RowCost:
    """FLOPs of a row, forward and backward as a stage trains, by its text tokens T and images M.

    They are a polynomial of second degree: products are linear in the tokens, attention is in their square. Six traces
    of the model determine it, and three another one for rows without an image, which reach neither encoder nor
    projectors. Differences of neighbouring sizes are integers, so Newton's interpolation between them is exact.
    """

    def __init__(self, config: Config, stage: str) -> None:
        model, groups = config.trained_model(stage), config.stage(stage).groups
        self._of = lambda text, images: int(flops.train_step(model, groups, 1, text, images))

    def __call__(self, text: npt.ArrayLike, images: npt.ArrayLike) -> Float64[np.ndarray, ...]:
        """Of rows of these sizes, which are broadcast against each other."""
        text, images = np.broadcast_arrays(np.asarray(text), np.asarray(images))
        cost = np.zeros(text.shape)
        for first, chosen in enumerate((images == 0, images > 0)):
            if chosen.any():
                differences = self._with_image if first else self._without_image
                cost[chosen] = sum(
                    difference * _binomial(text[chosen] - 1, i) * _binomial(images[chosen] - first, j)
                    for (i, j), difference in differences.items()
                )
        return cost

    @functools.cached_property
    def _with_image(self) -> dict[tuple[int, int], int]:
        return self._differences([(i, j) for i in range(3) for j in range(3 - i)], 1)

    @functools.cached_property
    def _without_image(self) -> dict[tuple[int, int], int]:
        return self._differences([(i, 0) for i in range(3)], 0)

    def _differences(self, orders: Sequence[tuple[int, int]], first: int) -> dict[tuple[int, int], int]:
        """Forward differences of these orders in T and M, at T = 1 and M = `first`."""
        of = {(i, j): self._of(1 + i, first + j) for i, j in orders}
        choices = lambda i, j: itertools.product(range(i + 1), range(j + 1))  # noqa: E731
        return {
            (i, j): sum(
                (-1) ** (i - a + j - b) * math.comb(i, a) * math.comb(j, b) * of[a, b] for a, b in choices(i, j)
            )
            for i, j in orders
        }


def _binomial(n: np.ndarray, k: int) -> np.ndarray:
    """n over k, for k up to 2."""
    return (np.ones(n.shape), n.astype(float), n * (n - 1.0) / 2)[k]


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
