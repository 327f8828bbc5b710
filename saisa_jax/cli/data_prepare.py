"""`python -m saisa_jax data prepare`: samples of any source as ArrayRecord shards that are checked and counted."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from rich.console import Console

from saisa_jax.cli.parser import Parser
from saisa_jax.config import STAGES, ConfigError
from saisa_jax.data import prepare
from saisa_jax.inference.features import FeatureEncoder, feature_spec


def main(argv: Sequence[str]) -> int:
    """The verb `data prepare`; 130 if it was stopped.

    Raises:
      ConfigError: the recipe is invalid.
      DataError: a source cannot be read, no sample can be used, or DIR holds something else.
    """
    parser = Parser("data prepare", prepare.__doc__, recipe=True)
    parser.add_argument("--stage", choices=STAGES, default="finetune", help="whose sources, template and text_length")
    parser.add_argument("--split", choices=tuple(prepare.SPLITS), default="train", help="which sources of the stage")
    parser.add_argument("--source", type=int, help="only that one of the list, from 0 (default: all, joined)")
    parser.add_argument("--output", required=True, help="a directory, local or gs://; an unfinished one is resumed")
    parser.add_argument(
        "--shards", type=int, help=f"files (default: one for each {prepare.SAMPLES_PER_SHARD:,} samples)"
    )
    parser.add_argument("--workers", type=int, help="processes, each making a shard (default: one for each core)")
    parser.add_argument("--image_size", type=int, help="make larger images smaller (default: keep them as they are)")
    parser.add_argument(
        "--features",
        action="store_true",
        help="what the vision encoder of --config.init_from, or of a teacher, makes of the images",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="with --features: images that are encoded at once")
    args, config = parser.parse_recipe(argv)
    if args.features and args.image_size is not None:
        parser.error("--image_size is of images, and --features writes none")
    source = config.init_from or config.distill.teacher
    if args.features and not source:
        raise ConfigError("--features needs the vision encoder: name a model that holds it with --config.init_from")
    features = feature_spec(config, source) if args.features else None
    job, plan = prepare.make_job(
        config,
        args.output,
        stage=args.stage,
        split=args.split,
        source=args.source,
        shards=args.shards,
        image_size=args.image_size,
        features=features,
    )
    console, started = Console(), time.perf_counter()
    workers = args.workers if args.workers is not None else os.cpu_count() or 1
    try:
        encode = lambda: FeatureEncoder(config, source, args.batch_size)  # noqa: E731
        index = prepare.prepare(job, plan, workers, console, encode if features else None)
    except KeyboardInterrupt:
        print(f"data prepare: stopped; the same command resumes in {job.to}", file=sys.stderr)
        return 130
    left_out = len(job.samples) - len(index.tokens)
    held = f"{'features of ' if features else ''}{int(index.images.sum()):,} images"
    size = sum(shard.bytes for shard in index.shards)
    console.print(
        f"{job.to}: {len(index.tokens):,} samples with {held} and "
        f"{int(index.tokens.sum()):,} text tokens in {len(index.shards)} shard(s), {size / 2**20:,.1f} MiB, in "
        f"{time.perf_counter() - started:.0f} s",
        highlight=False,
        soft_wrap=True,
    )
    if left_out:
        console.print(
            f"{left_out:,} of {len(job.samples):,} samples left out: {job.to}/{prepare.REPORT}", highlight=False
        )
    also = " --config.data.features=True" if features else ""
    console.print(
        f"to train on it: --config.{job.stage}.sources=\"({{'format': 'arrayrecord', 'path': '{job.to}'}},)\"{also}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 0
