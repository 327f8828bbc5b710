"""`python -m saisa_jax bench data`: how many images a second one core prepares, and what a TPU host would need.

Each round does the same work three times, alternating: as the pipeline does it (decode, pad and resize, tokenise,
pack); with PIL and transformers' processor (CLIP's; of `anyres` LLaVA-NeXT's) up to the same uint8 pixels; and with
them up to normalised float32 pixels, as LLaVA does. The processor time of the one working thread is measured, so that
other load on the machine does not count; the figures are medians over the rounds.
"""

from __future__ import annotations

import dataclasses
import io
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.table import Table
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from saisa_jax import flops, presets
from saisa_jax.chips import CHIPS
from saisa_jax.config import (
    TRAIN_ALL_BUT_VISION,
    TRAIN_PROJECTOR,
    Config,
    ConfigError,
    VisionConfig,
)
from saisa_jax.data.images import load_image
from saisa_jax.data.rows.collate import Example, pack_rows
from saisa_jax.data.rows.packing import pack
from saisa_jax.data.sample import ASSISTANT, USER, ImageSource, Sample, Turn
from saisa_jax.data.sources import easy_vqa
from saisa_jax.data.text.encoder import Encoder
from saisa_jax.data.views import count_views, prepare_views

STAGES: tuple[str, ...] = ("decode", "pad and resize", "tokenise", "pack")
ROW_TEXT, ROW_IMAGES = 1024, 4  # text tokens and images of a packed row
CORES, CHIPS_A_HOST = 16, 4
CAPTION = 32  # text tokens of a sample of stage 1


@dataclass(frozen=True)
class Round:
    """Processor seconds of one round."""

    stages: dict[str, float]  # of the pipeline, by STAGES
    same: float  # PIL and transformers, up to uint8
    llava: float  # PIL and transformers, up to normalised float32

    @property
    def ours(self) -> float:
        return sum(self.stages.values())


class Pipeline:
    """The pipeline's own functions, stage by stage, in one thread."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerFast) -> None:
        self.vision = config.model.vision
        self.encode = Encoder(config, "finetune", tokenizer)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Prepares the samples, an image each; returns the seconds of each stage."""
        seconds = dict.fromkeys(STAGES, 0.0)
        examples: list[Example] = []
        for sample in samples:
            start = time.thread_time()
            image = load_image(sample.images[0], sample.id)
            decoded = time.thread_time()
            views = prepare_views(image, self.vision)
            resized = time.thread_time()
            encoded, _ = self.encode(sample)
            tokenised = time.thread_time()
            examples.append(Example(encoded, list(views)))
            for stage, taken in zip(STAGES, (decoded - start, resized - decoded, tokenised - resized), strict=False):
                seconds[stage] += taken
        start = time.thread_time()
        self._pack(examples)
        seconds["pack"] = time.thread_time() - start
        return seconds

    def _pack(self, examples: Sequence[Example]) -> None:
        tokens = np.array([len(example.encoded.tokens) for example in examples], np.int32)
        slots = np.array([len(example.encoded.image_positions) for example in examples], np.int32)
        shape = ROW_TEXT, ROW_IMAGES * self.vision.max_views
        plan = pack(tokens, slots, *shape, [0])
        pack_rows([[examples[i] for i in plan[row]] for row in range(len(plan))], *shape, self.vision.image_size)


class Peer:
    """The same work with PIL and transformers' processors, as LLaVA's code is written."""

    def __init__(self, vision: VisionConfig, tokenizer: PreTrainedTokenizerFast, normalised: bool) -> None:
        side = vision.image_size
        options: dict[str, Any] = {
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
            "do_rescale": normalised,
            "do_normalize": normalised,
        }
        self.grids = [list(grid) for grid in vision.grids]
        self.processor: Any = (
            LlavaNextImageProcessorPil(**options, image_grid_pinpoints=self.grids)
            if self.grids
            else CLIPImageProcessorPil(**options)
        )
        self.color = tuple(int(255 * value) for value in vision.image_mean)
        self.tokenizer = tokenizer

    def __call__(self, samples: Sequence[Sample]) -> float:
        """Prepares the samples; returns the seconds."""
        start = time.thread_time()
        pixels = [self._pixels(sample.images[0]) for sample in samples]
        np.concatenate(pixels)
        for sample in samples:
            _ = self.tokenizer(" ".join(turn.text for turn in sample.turns)).input_ids
        return time.thread_time() - start

    def _pixels(self, source: ImageSource) -> np.ndarray:
        """[views, 3, size, size]."""
        assert isinstance(source, bytes), "a file's bytes"
        image = Image.open(io.BytesIO(source)).convert("RGB")
        if self.grids:
            return self.processor(image, return_tensors="np").pixel_values[0]
        long = max(image.size)
        square = Image.new("RGB", (long, long), self.color)
        square.paste(image, ((long - image.width) // 2, (long - image.height) // 2))
        return self.processor(square, return_tensors="np").pixel_values


def bench(config: Config, tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample], repeat: int) -> list[Round]:
    """Rounds over the same samples, after one warm-up round.

    Args:
      config: `model.vision`, the template and the system prompt count.
      tokenizer: any.
      samples: each with one image, as the bytes of a file.
      repeat: rounds.
    """
    vision = config.model.vision
    ours = Pipeline(config, tokenizer)
    same, llava = Peer(vision, tokenizer, normalised=False), Peer(vision, tokenizer, normalised=True)
    rounds: list[Round] = []
    for number in range(repeat + 1):
        runs: list[tuple[str, Callable]] = [("ours", ours), ("same", same), ("llava", llava)]
        taken = {name: run(samples) for name, run in (reversed(runs) if number % 2 else runs)}
        rounds.append(Round(taken["ours"], taken["same"], taken["llava"]))
    return rounds[1:]


def make_samples(images: Sequence[bytes], words: int) -> list[Sample]:
    """A question of 20 words about each image, and an answer of `words`; all texts differ."""
    rng = np.random.default_rng(0)
    known = sorted({word for text in easy_vqa.texts() for word in text.split()})

    def text(count: int) -> str:
        return " ".join(rng.choice(known, count))

    return [
        Sample(f"bench/{n}", (Turn(USER, f"<image>\n{text(20)}"), Turn(ASSISTANT, text(words))), (image,))
        for n, image in enumerate(images)
    ]


def photographs(count: int) -> list[bytes]:
    """JPEG files of smooth noise, 640 x 480 or upright, of about the size of a photograph's (quality 90)."""
    rng = np.random.default_rng(0)
    files: list[bytes] = []
    for number in range(count):
        width, height = (640, 480) if number % 3 else (480, 640)
        pixels = np.full((height, width, 3), 128.0)
        for cells, strength in ((160, 50), (40, 30), (10, 18), (4, 14), (2, 13)):  # pixels of a cell of the noise
            noise = rng.integers(0, 256, (height // cells + 1, width // cells + 1, 3), np.uint8)
            layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            pixels += (np.asarray(layer, np.float32) - 128) * (strength / 64)
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def read_images(directory: Path, count: int) -> list[bytes]:
    """The first `count` files of a directory, by name; again from the start if there are fewer.

    Raises:
      ConfigError: there is none.
    """
    paths = sorted(path for path in directory.glob("*") if path.is_file())[:count]
    if not paths:
        raise ConfigError(f"--images={directory} holds no files")
    return [paths[n % len(paths)].read_bytes() for n in range(count)]


# --- What is printed -------------------------------------------------------------------------------------------------


def path_table(rounds: Sequence[Round], count: int) -> Table:
    """Images a second of one core, the share of each stage, and the ratios to the peers."""

    def median(of: Callable[[Round], float]) -> float:
        return statistics.median(map(of, rounds))

    table = Table("on one core", "ms an image", "share", "images/s", "pipeline / peer")
    for column in table.columns[1:]:
        column.justify = "right"
    for stage in STAGES:
        share = median(lambda r, stage=stage: r.stages[stage] / r.ours)
        table.add_row(stage, f"{1e3 * median(lambda r, stage=stage: r.stages[stage]) / count:.3f}", f"{share:.1%}")
    table.add_section()
    ours = median(lambda r: r.ours)
    table.add_row("the pipeline", f"{1e3 * ours / count:.3f}", "100%", f"{count / ours:.0f}")
    for name, seconds in (
        ("peer, uint8", lambda r: r.same),
        ("peer, float32", lambda r: r.llava),
    ):
        taken, ratio = median(seconds), median(lambda r, seconds=seconds: seconds(r) / r.ours)
        table.add_row(name, f"{1e3 * taken / count:.3f}", "", f"{count / taken:.0f}", f"{ratio:.2f}")
    return table


def demand_table(text: int, images_per_second: float, chip: str, mfu: float, views: int = 1) -> Table:
    """What a host of four TPU chips needs for the 7B recipe, and what 16 cores deliver, in tokens of both kinds.

    Args:
      text: text tokens of a sample of stage 2; a sample has one image.
      images_per_second: of a core.
      chip: one of CHIPS.
      mfu: the fraction of the chips' peak that is reached.
      views: image slots of an image.
    """
    table = Table("7B recipe", "text", "TFLOP", "samples/s", "tokens/s", f"{CORES} cores", "times")
    for column in table.columns[1:]:
        column.justify = "right"
    for alignment in ("saisa", "llava"):
        model = presets.make("vicuna-7b", "clip-vit-l-336", alignment)
        shared = dataclasses.replace(model, projector=dataclasses.replace(model.projector, sharing="shared"))
        for name, staged, groups, tokens in (
            ("pretrain", shared, TRAIN_PROJECTOR, CAPTION),
            ("finetune", model, TRAIN_ALL_BUT_VISION, text),
        ):
            of_sample = flops.train_step(staged, groups, 1, tokens, views)
            needed = CHIPS_A_HOST * CHIPS[chip].flops * mfu / of_sample
            delivered = CORES * images_per_second  # samples a second
            whole = tokens + views * model.vision.num_patches
            table.add_row(
                f"{alignment}, {name}",
                str(tokens),
                f"{of_sample / 1e12:.1f}",
                f"{needed:.1f}",
                f"{needed * whole:,.0f}",
                f"{delivered * whole:,.0f}",
                f"{delivered / needed:.0f}",
            )
    return table


def most_views(samples: Sequence[Sample], vision: VisionConfig) -> int:
    """Image slots of the image that takes most of them."""
    return max(count_views(image, vision, sample.id) for sample in samples for image in sample.images)


def text_length(sample: Sample, config: Config, tokenizer: PreTrainedTokenizerFast) -> int:
    return len(Encoder(config, "finetune", tokenizer)(sample)[0].tokens)
