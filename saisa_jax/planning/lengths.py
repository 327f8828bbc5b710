"""How long a stage is, as far as it is known without its data: stand-ins for the lengths of the paper's samples.

How many samples LLaVA's two files hold is published; how long they are is not. The stand-ins are drawn from simple
distributions, on average 21 text tokens in stage 1 and 233 in stage 2, and pictures are of 640 x 480 pixels, as COCO's.
`python -m saisa_jax rows` counts the files themselves where they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
from jaxtyping import Int32

from saisa_jax.config import ConfigError, StageConfig, VisionConfig
from saisa_jax.data.rows.packing import WINDOW, pack
from saisa_jax.data.sample import DataError
from saisa_jax.data.views import num_views

Counts = tuple[Int32[np.ndarray, " n"], Int32[np.ndarray, " n"]]  # text tokens and image slots of each sample
PICTURE = 640, 480  # pixels

ENOUGH = 4 * WINDOW  # samples that are packed, of however many: shares come out within a few tenths of a percent


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
STAND_INS = {"blip_laion_cc_sbu_558k.json": llava_pretrain, "llava_v1_5_mix665k.json": llava_finetune}


def some(counts: Counts) -> tuple[Int32[np.ndarray, " m"], Int32[np.ndarray, " m"]]:
    """ENOUGH of the samples, drawn at random."""
    chosen = np.random.default_rng(0).permutation(len(counts[0]))[:ENOUGH]
    return counts[0][chosen], counts[1][chosen]


def in_slots(counts: Counts, vision: VisionConfig) -> Counts:
    """Samples counted by pictures, by the image slots that these take."""
    return counts[0], counts[1] * num_views(PICTURE, vision)


def known_counts(settings: StageConfig, vision: VisionConfig) -> Counts | None:
    """Of those of a stage's sources that have a stand-in; None: of none.

    Raises:
      DataError: a row has no room for one picture.
    """
    names = [PurePath(source.path).name for source in settings.sources]
    known = [STAND_INS[name]() for name in names if name in STAND_INS]
    if not known:
        return None
    views = num_views(PICTURE, vision)
    if views > max(settings.max_images, 1):
        raise DataError(
            f"max_images={settings.max_images} has no room for a picture of {PICTURE[0]} x {PICTURE[1]} pixels, which "
            f"model.vision.image_mode=anyres cuts into {views} views: raise the stage's max_images"
        )
    return in_slots((np.concatenate([of[0] for of in known]), np.concatenate([of[1] for of in known])), vision)


@dataclass(frozen=True)
class Length:
    """How long a stage is: samples of one step, on average, and steps."""

    samples_per_step: float
    steps: int


def length(
    settings: StageConfig,
    packing: bool,
    vision: VisionConfig,
    samples: int | None = None,
    per_row: float | None = None,
) -> Length:
    """How long a stage takes, as far as it is known without its data.

    Args:
      settings: the stage's.
      packing: whether rows hold several samples.
      vision: how many image slots a picture takes.
      samples: of its sources; None: of those that have a stand-in.
      per_row: samples of a row; None: as many as packing finds room for in rows of its T and M.

    Raises:
      ConfigError: how many samples there are is unknown.
    """
    names = [PurePath(source.path).name for source in settings.sources]
    known = known_counts(settings, vision)
    total = len(known[0]) if known else 0
    if settings.steps is None and samples is None and not set(names) <= set(STAND_INS):
        raise ConfigError(f"it is unknown how many samples {', '.join(map(str, settings.sources))} hold: set --samples")
    if per_row is None and packing and known:
        tokens, images = some(known)
        tokens, images = np.minimum(tokens, settings.text_length), np.minimum(images, settings.max_images)
        per_row = len(tokens) / len(pack(tokens, images, settings.text_length, settings.max_images, [0]))
    per_step = settings.batch_size * (per_row or 1.0)
    steps = math.floor(settings.epochs * (total if samples is None else samples) / per_step)
    return Length(per_step, settings.steps or max(1, steps))
