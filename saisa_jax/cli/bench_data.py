"""`python -m saisa_jax bench data`: how many images a second one core prepares, and what a TPU host would need."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from saisa_jax.bench import data
from saisa_jax.chips import CHIPS
from saisa_jax.cli.parser import Parser
from saisa_jax.config import Config, ConfigError, ModelConfig, StageConfig, VisionConfig
from saisa_jax.data.text.tokenizer import load_tokenizer


def main(argv: Sequence[str]) -> int:
    """The verb `bench data`.

    Raises:
      ConfigError, DataError: a flag, an image or the tokenizer cannot be used.
    """
    parser = Parser("bench data", data.__doc__)
    parser.add_argument("--size", type=int, default=336, help="pixels of a prepared image's side (default 336)")
    parser.add_argument("--image_mode", choices=("pad", "anyres"), default="pad", help="default: pad")
    parser.add_argument("--images", help="a directory of images; without it: JPEG files of noise, 640 x 480")
    parser.add_argument("--limit", type=int, default=64, help="images of a round (default 64)")
    parser.add_argument("--repeat", type=int, default=7, help="rounds (default 7)")
    parser.add_argument("--words", type=int, default=180, help="words of an answer (default 180)")
    parser.add_argument("--tokenizer", default="easy_vqa", help="a directory (default: the demo's)")
    parser.add_argument("--template", default="vicuna_v1", help="that suits the tokenizer (default vicuna_v1)")
    parser.add_argument("--chip", choices=CHIPS, default="v5e", help="default: v5e")
    parser.add_argument("--mfu", type=float, default=0.5, help="share of the chip's peak (default 0.5)")
    options = parser.parse_args(argv)
    for name in ("limit", "repeat", "words"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name}={getattr(options, name)} must be at least 1")
    if not 0 < options.mfu <= 1:
        raise ConfigError(f"--mfu={options.mfu} is not a share (0..1)")
    vision = VisionConfig(image_size=options.size, image_mode=options.image_mode)
    config = Config(
        model=ModelConfig(vision=vision, max_length=2048 + vision.max_views * vision.num_patches),
        finetune=StageConfig(template=options.template, max_images=vision.max_views),
    )
    tokenizer = load_tokenizer(options.tokenizer)
    images = (
        data.read_images(Path(options.images), options.limit) if options.images else data.photographs(options.limit)
    )
    samples = data.make_samples(images, options.words)
    rounds = data.bench(config, tokenizer, samples, options.repeat)
    text = round(statistics.mean(data.text_length(sample, config, tokenizer) for sample in samples))
    views = data.most_views(samples, vision)
    console = Console(highlight=False, soft_wrap=True)
    kind = f"of {options.images}" if options.images else "of noise, 640 x 480 JPEG"
    console.print(
        f"{options.limit} images {kind}, {statistics.mean(map(len, images)) / 2**10:.0f} KiB each, to {options.size} x "
        f"{options.size}{f' in up to {views} views' if views > 1 else ''}; {text} text tokens a sample; medians of "
        f"{options.repeat} rounds, processor time"
    )
    console.print(data.path_table(rounds, options.limit))
    console.print(
        f"The peer is PIL with transformers' {'LLaVA-NeXT' if vision.grids else 'CLIP'} processor, up to the same "
        "uint8 pixels, and up to float32 as in LLaVA."
        f"\n\nWhat {data.CHIPS_A_HOST} {options.chip} chips need at {options.mfu:.0%} of "
        f"{CHIPS[options.chip].flops / 1e12:.0f} TFLOP/s (bfloat16) each, "
        f"beside {data.CORES} cores at the pipeline's rate above; a sample has one image"
        f"{f' of {views} views' if views > 1 else ''}:"
    )
    rate = options.limit / statistics.median(r.ours for r in rounds)
    console.print(data.demand_table(text, rate, options.chip, options.mfu, views))
    return 0
