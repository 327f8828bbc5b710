"""The text tokens and images of each sample, from which rows are planned."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Int32
from transformers import PreTrainedTokenizerFast

from saisa_jax.config import Config, DataConfig, SourceConfig
from saisa_jax.data.images import missing_image
from saisa_jax.data.sample import DataError, EmptyAnswerError, Samples, TooLongError
from saisa_jax.data.text.encoder import Encoder
from saisa_jax.data.text.templates import find_template

Counts = tuple[Int32[np.ndarray, " n"], Int32[np.ndarray, " n"]]  # text tokens (0: unusable) and images

RULES = 2  # raised when the same sample becomes other tokens

_SECONDS_BETWEEN_LINES = 10
_SHOWN = 10  # samples that cannot be used


@dataclass
class Unusable:
    """Samples that cannot be used: how many, and the first of them in words."""

    number: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, *errors: DataError | str) -> None:
        self.number += len(errors)
        self.first += map(str, errors[: max(0, _SHOWN - len(self.first))])

    def __str__(self) -> str:
        return "; ".join(self.first) + ("; ..." if self.number > len(self.first) else "")


def check_unusable(unusable: Unusable, total: int, data: DataConfig, where: str) -> None:
    """What becomes of samples that cannot be used, of `total`: an error that tells of all of them, or a warning.

    Raises:
      DataError: `data.on_error` is raise, or they are more than `data.max_drop` of all.
    """
    number = unusable.number
    if not number:
        return
    if data.on_error == "raise" and number == 1:
        raise DataError(unusable.first[0])
    seen = f"{where}: {number:,} of {total:,} samples cannot be used: {unusable}"
    if data.on_error == "raise":
        raise DataError(f"{seen}. Mend them, or leave them out with --config.data.on_error=drop")
    if number > data.max_drop * total:
        raise DataError(
            f"{seen}. That is {number / total:.1%}, more than --config.data.max_drop="
            f"{data.max_drop}: mend them, or raise it"
        )
    logging.warning("%s; they are left out", seen)


def count(samples: Samples, config: Config, stage: str, tokenizer: PreTrainedTokenizerFast) -> tuple[Counts, Unusable]:
    """Text tokens and images of every sample, in full length; no image is opened, but each has to be there.

    Returns:
      int32 (tokens, images), with 0 tokens for a sample that cannot be used or has an empty answer; and those that
      cannot be used. (Those with an empty answer are told of here.)
    """
    encoder, files = Encoder(config, stage, tokenizer), _Files()
    tokens, images = np.zeros(len(samples), np.int32), np.zeros(len(samples), np.int32)
    empty, unusable = Unusable(), Unusable()
    for number in _with_progress(len(samples), stage):
        try:
            sample = samples[number]
            encoded = encoder.whole(sample)
            for image in () if config.data.blind else sample.images:
                if isinstance(image, str | os.PathLike) and image not in files:
                    raise missing_image(os.fspath(image), sample.id)
        except EmptyAnswerError as error:
            empty.add(error)
            continue
        except DataError as error:
            unusable.add(error)
            continue
        tokens[number], images[number] = len(encoded.tokens), len(encoded.image_positions)
    if empty.number:
        logging.warning("%s: %s sample(s) with an empty answer are left out: %s", stage, f"{empty.number:,}", empty)
    return (tokens, images), unusable


class _Files:
    """Which files are there, by one listing of each folder: a network's disk takes long to answer for each of them."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}

    def __contains__(self, path: str | os.PathLike[str]) -> bool:
        folder, name = os.path.split(os.fspath(path))
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(os.listdir(folder))
            except OSError:
                self._names[folder] = frozenset()
        return name in self._names[folder] or os.path.exists(path)


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
) -> tuple[Counts, Unusable]:
    """The counts of all sources: of a source's own index, of the cache, or counted now; and what cannot be used."""
    parts, unusable = [], Unusable()
    for samples, source in zip(opened, sources, strict=True):
        part, found = _counts_of(samples, source, config, stage, tokenizer, cache)
        parts.append(part)
        unusable.first += found.first[: _SHOWN - len(unusable.first)]
        unusable.number += found.number
    tokens, images = (np.concatenate(part) for part in zip(*parts, strict=True))
    return (tokens, images), unusable


def _counts_of(
    samples: Samples,
    source: SourceConfig,
    config: Config,
    stage: str,
    tokenizer: PreTrainedTokenizerFast,
    cache: str | None,
) -> tuple[Counts, Unusable]:
    mark = fingerprint(config, stage, tokenizer)
    indexed = getattr(samples, "counts", None)
    if indexed is not None and (found := indexed(mark)) is not None:
        return found, Unusable()
    if cache is None:
        return count(samples, config, stage, tokenizer)
    # An archive says which images there are, and `on_error` whether a sample without its own is an error.
    stamps = (_stamp(source.path), _stamp(source.images), config.data.on_error)
    if (version := getattr(samples, "version", None)) is not None:  # of a source of several files
        stamps = (*stamps, version)
    key = hashlib.sha256(repr((source, len(samples), stamps, mark)).encode()).hexdigest()[:16]
    path = epath.Path(cache) / f"counts-{key}.npz"
    if path.exists():
        with path.open("rb") as file, np.load(io.BytesIO(file.read())) as stored:
            first = stored["unusable"].tolist() if "unusable" in stored else []
            unusable = Unusable(int(stored["number"]) if first else 0, first)
            # With on_error=raise what could not be used is looked at again: it may have been mended meanwhile.
            if not unusable.number or config.data.on_error == "drop":
                return (stored["tokens"], stored["images"]), unusable
    (tokens, images), unusable = count(samples, config, stage, tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.savez(content, tokens=tokens, images=images, number=unusable.number, unusable=np.array(unusable.first, str))
    half = path.parent / f".{path.name}.{secrets.token_hex(4)}"  # other processes may count at the same time
    half.write_bytes(content.getvalue())
    half.replace(path)
    return (tokens, images), unusable


def _stamp(name: str) -> tuple[int, int] | None:
    """When a source's file was written, and its size."""
    path = Path(name)
    return (path.stat().st_mtime_ns, path.stat().st_size) if name and path.is_file() else None


def room_needed(counts: Counts, samples: Any, encoder: Encoder, unusable: Unusable) -> Counts:
    """The room that samples need in a row, at most: counts after truncation, and 0 tokens for what is left out.

    Args:
      counts: in full length.
      samples: that were counted.
      encoder: of the stage.
      unusable: what is known of already.

    Raises:
      DataError: as `check_unusable`, of those that were known and of what does not fit a row.
    """
    tokens, images = counts
    config, settings = encoder.config, encoder.config.stage(encoder.stage)
    room = np.minimum(settings.text_length, config.model.max_length - images * config.model.vision.num_patches)
    long, left_out = tokens > room, np.zeros(len(tokens), bool)
    if config.data.on_long == "drop":
        left_out |= long
    for number in np.flatnonzero((long | (images > settings.max_images)) & ~left_out).tolist():
        try:
            encoder(samples[number])  # it says what does not fit, or that no answer is left of it
        except DataError as error:
            if isinstance(error, TooLongError) and config.data.on_error == "drop":
                raise  # `data.on_long` is raise
            unusable.add(error)
            left_out[number] = True
    check_unusable(unusable, len(tokens), config.data, encoder.stage)
    if config.data.on_long == "drop" and long.any():
        logging.warning("%s: %d samples that do not fit a row are left out", encoder.stage, long.sum())
    tokens = np.where(left_out, 0, tokens)
    return np.minimum(tokens, settings.text_length), np.minimum(images, settings.max_images)
