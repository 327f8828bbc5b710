"""The text tokens and images of each sample, from which rows are planned."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Integer
from transformers import PreTrainedTokenizerFast

from saisa_jax import buckets
from saisa_jax.config import Config, SourceConfig
from saisa_jax.data.rows.counting import Effort, counted
from saisa_jax.data.rows.order import Concatenated
from saisa_jax.data.rows.unusable import SHOWN, Unusable, check_unusable
from saisa_jax.data.sample import DataError, Samples, TooLongError
from saisa_jax.data.text.encoder import Encoder
from saisa_jax.data.text.templates import find_template

# Text tokens (0: unusable) and image slots, in integers of any size: of 100 million samples each byte counts.
Counts = tuple[Integer[np.ndarray, " n"], Integer[np.ndarray, " n"]]

SLICE = 2**22  # counts that are worked on together
LOOKED_AT = 2**15  # samples that may not fit a row are read before training, at most; others when it is their turn
RULES = 2  # raised when the same sample becomes other tokens


def fingerprint(config: Config, stage: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of everything that the counts of the same samples depend on: tokenizer, template, system prompt, rules."""
    template = find_template(config.stage(stage).template)
    parts = [tokenizer.backend_tokenizer.to_str(), repr(template), repr(config.data.system_prompt), str(RULES)]
    parts.append(str(tokenizer.init_kwargs.get("legacy")))
    if config.model.vision.grids:  # how many slots an image takes
        parts.append(repr((config.model.vision.grids, config.model.vision.image_size)))
    if template.own:
        parts.append(str(tokenizer.chat_template))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def counts_of_sources(
    opened: Sequence[Samples],
    sources: Sequence[SourceConfig],
    encoder: Encoder,
    effort: Effort,
    cache: str | None,
    contents: Sequence[str] = (),
) -> tuple[Counts, Unusable]:
    """The counts of all sources: of a source's own index, of the cache, or counted now; and what cannot be used.

    Args:
      opened: the sources' samples.
      sources: their configurations.
      encoder: of the stage.
      effort: who counts.
      cache: a directory where counts are kept; None: they are not.
      contents: a mark of each source (`content_mark`), where counts are kept.

    Raises:
      CountingStopped: it was asked to.
    """
    parts, unusable, stage = [], Unusable(), encoder.stage
    mark = fingerprint(encoder.config, stage, encoder.tokenizer)
    for number, (samples, source) in enumerate(zip(opened, sources, strict=True)):
        indexed = getattr(samples, "counts", None)
        if indexed is not None and (found := indexed(mark)) is not None:
            parts.append(found)
            continue
        kept = None
        if cache is not None:
            # An archive says which images there are.
            said = (
                dataclasses.replace(source, weight=1.0), len(samples), contents[number], _stamp(source.images),
                encoder.config.data.blind, mark,
            )  # fmt: skip
            key = hashlib.sha256(repr(said).encode()).hexdigest()[:16]
            kept = buckets.place(cache) / f"counts-{key}.npz"
        part = counted(samples, encoder, effort, kept)
        if part.empty:
            told = Unusable(part.empty, list(part.first_empty))
            logging.warning("%s: %s sample(s) with an empty answer are left out: %s", stage, f"{part.empty:,}", told)
        parts.append((part.tokens, part.images))
        unusable.number += len(part.unusable)
        unusable.first += part.first[: SHOWN - len(unusable.first)]
    if len(parts) == 1:  # a copy may be large
        return parts[0], unusable
    tokens, images = (np.concatenate(part) for part in zip(*parts, strict=True))
    return (tokens, images), unusable


def _stamp(name: str) -> tuple[int, int] | None:
    """When a source's file was written, and its size."""
    path = Path(name)
    return (path.stat().st_mtime_ns, path.stat().st_size) if name and path.is_file() else None


def room_needed(counts: Counts, samples: Concatenated, encoder: Encoder, unusable: Unusable) -> Counts:
    """The room that samples need in a row, at most: counts after truncation, and 0 tokens for what is left out.

    Args:
      counts: in full length.
      samples: that were counted.
      encoder: of the stage.
      unusable: what is known of already.

    Raises:
      DataError: as `check_unusable`, of those that were known and of what does not fit a row.
    """
    config, settings = encoder.config, encoder.config.stage(encoder.stage)
    total = len(counts[0])
    tokens = np.zeros(total, np.min_scalar_type(settings.text_length))
    images = np.zeros(total, np.min_scalar_type(settings.max_images))
    dropped, may_look = 0, LOOKED_AT if not samples.copied else 0  # at random, it would copy file after file
    for first in range(0, total, SLICE):
        part = slice(first, first + SLICE)
        all_tokens, all_images = (count[part].astype(np.int32) for count in counts)
        room = np.minimum(settings.text_length, config.model.max_length - all_images * config.model.num_visual_tokens)
        long, left_out = all_tokens > room, np.zeros(len(all_tokens), bool)
        if config.data.on_long == "drop":
            left_out |= long
            dropped += int(long.sum())
        unfit = np.flatnonzero((long | (all_images > settings.max_images)) & ~left_out)[:may_look]
        may_look -= len(unfit)
        for number in unfit.tolist():
            try:
                encoder(samples[first + number])  # it says what does not fit, or that no answer is left of it
            except DataError as error:
                if isinstance(error, TooLongError) and config.data.on_error == "drop":
                    raise  # `data.on_long` is raise
                unusable.add(error)
                left_out[number] = True
        tokens[part] = np.where(left_out, 0, np.minimum(all_tokens, settings.text_length))
        images[part] = np.minimum(all_images, settings.max_images)
    check_unusable(unusable, total, config.data, encoder.stage)
    if dropped:
        logging.warning("%s: %d samples that do not fit a row are left out", encoder.stage, dropped)
    return tokens, images
