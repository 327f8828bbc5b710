"""The text tokens and images of each sample, from which rows are planned."""

from __future__ import annotations

import hashlib
import io
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Int32
from transformers import PreTrainedTokenizerFast

from saisa_jax.config import Config, SourceConfig
from saisa_jax.data.sample import DataError, EmptyAnswerError, Samples
from saisa_jax.data.text.encoder import Encoder
from saisa_jax.data.text.templates import find_template

Counts = tuple[Int32[np.ndarray, " n"], Int32[np.ndarray, " n"]]  # text tokens (0: unusable) and images

RULES = 2  # raised when the same sample becomes other tokens

_SECONDS_BETWEEN_LINES = 10
_MAX_WARNINGS = 20  # of samples that are left out


def count(samples: Samples, config: Config, stage: str, tokenizer: PreTrainedTokenizerFast) -> Counts:
    """Text tokens and images of every sample, in full length; no image is opened.

    Returns:
      int32 (tokens, images). A sample that cannot be used has 0 tokens, where `data.on_error` is drop, and so has one
      with an empty answer, wherever.

    Raises:
      DataError: a sample that cannot be used, where `data.on_error` is raise.
    """
    encoder = Encoder(config, stage, tokenizer)
    tokens, images = np.zeros(len(samples), np.int32), np.zeros(len(samples), np.int32)
    empty: list[DataError] = []
    left_out = 0
    for number in _with_progress(len(samples), stage):
        try:
            encoded = encoder.whole(samples[number])
        except EmptyAnswerError as error:
            empty.append(error)
            continue
        except DataError as error:
            if config.data.on_error == "raise":
                raise
            if (left_out := left_out + 1) <= _MAX_WARNINGS:
                logging.warning("left out: %s", error)
            continue
        tokens[number], images[number] = len(encoded.tokens), len(encoded.image_positions)
    if empty:
        first = "; ".join(map(str, empty[:10]))
        logging.warning("%s: %s sample(s) with an empty answer are left out: %s", stage, f"{len(empty):,}", first)
    return tokens, images


def fingerprint(config: Config, stage: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of everything that the counts of the same samples depend on: tokenizer, template, system prompt, rules."""
    template = find_template(config.stage(stage).template)
    parts = [tokenizer.backend_tokenizer.to_str(), repr(template), repr(config.data.system_prompt), str(RULES)]
    parts.append(str(tokenizer.init_kwargs.get("legacy")))
    if template.own:
        parts.append(str(tokenizer.chat_template))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _with_progress(total: int, stage: str) -> Iterator[int]:
    """0..total - 1, with a progress line now and then."""
    told = time.monotonic()
    for number in range(total):
        if time.monotonic() - told > _SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            logging.info(
                "%s: counting tokens, %s of %s samples (`data prepare` does it once)",
                stage,
                f"{number:,}",
                f"{total:,}",
            )
        yield number


def counts_of_sources(
    opened: Sequence[Samples],
    sources: Sequence[SourceConfig],
    config: Config,
    stage: str,
    tokenizer: PreTrainedTokenizerFast,
    cache: str | None,
) -> Counts:
    """The counts of all sources: of a source's own index, of the cache, or counted now."""
    parts = [
        _counts_of(samples, source, config, stage, tokenizer, cache)
        for samples, source in zip(opened, sources, strict=True)
    ]
    tokens, images = (np.concatenate(part) for part in zip(*parts, strict=True))
    return tokens, images


def _counts_of(
    samples: Samples,
    source: SourceConfig,
    config: Config,
    stage: str,
    tokenizer: PreTrainedTokenizerFast,
    cache: str | None,
) -> Counts:
    mark = fingerprint(config, stage, tokenizer)
    indexed = getattr(samples, "counts", None)
    if indexed is not None and (found := indexed(mark)) is not None:
        return found
    if cache is None:
        return count(samples, config, stage, tokenizer)
    key = hashlib.sha256(repr((source, len(samples), _stamp(source), mark)).encode()).hexdigest()[:16]
    path = epath.Path(cache) / f"counts-{key}.npz"
    if path.exists():
        with path.open("rb") as file, np.load(io.BytesIO(file.read())) as stored:
            return stored["tokens"], stored["images"]
    tokens, images = count(samples, config, stage, tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.savez(content, tokens=tokens, images=images)
    half = path.parent / f".{path.name}.{secrets.token_hex(4)}"  # other processes may count at the same time
    half.write_bytes(content.getvalue())
    half.replace(path)
    return tokens, images


def _stamp(source: SourceConfig) -> tuple[int, int] | None:
    """When a source's file was written, and its size."""
    path = Path(source.path)
    return (path.stat().st_mtime_ns, path.stat().st_size) if source.path and path.is_file() else None


def room_needed(counts: Counts, samples: Any, encoder: Encoder) -> Counts:
    """The room that samples need in a row, at most: counts after truncation, and 0 tokens for what is left out.

    Raises:
      DataError: a sample that does not fit, where it is not to be dropped.
    """
    tokens, images = counts
    config, settings = encoder.config, encoder.config.stage(encoder.stage)
    room = np.minimum(settings.text_length, config.model.max_length - images * config.model.vision.num_patches)
    for wrong, policy in ((tokens > room, config.data.on_long), (images > settings.max_images, config.data.on_error)):
        if policy == "raise":
            for number in np.flatnonzero(wrong)[:1]:
                encoder(samples[int(number)])  # it says what does not fit
        elif policy == "drop" and wrong.any():
            logging.warning("%s: %d samples that do not fit a row are left out", encoder.stage, wrong.sum())
            tokens = np.where(wrong, 0, tokens)
    return np.minimum(tokens, settings.text_length), np.minimum(images, settings.max_images)
