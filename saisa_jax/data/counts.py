"""How long samples are: the text tokens and images of each, which rows are planned by."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator

import numpy as np
from absl import logging
from jaxtyping import Int32
from transformers import PreTrainedTokenizerFast

from saisa_jax.config import Config
from saisa_jax.data.encoder import Encoder
from saisa_jax.data.sample import DataError, Samples
from saisa_jax.data.templates import find_template

Counts = tuple[Int32[np.ndarray, " n"], Int32[np.ndarray, " n"]]  # text tokens (0: unusable) and images

_SECONDS_BETWEEN_LINES = 10


def count(samples: Samples, config: Config, stage: str, tokenizer: PreTrainedTokenizerFast) -> Counts:
    """Text tokens and images of every sample, in full length; no image is opened.

    Returns:
      int32 (tokens, images). A sample that cannot be used has 0 tokens, where `data.on_error` is drop.

    Raises:
      DataError: a sample that cannot be used, where `data.on_error` is raise.
    """
    encoder = Encoder(config, stage, tokenizer)
    tokens, images = np.zeros(len(samples), np.int32), np.zeros(len(samples), np.int32)
    for number in _with_progress(len(samples), stage):
        try:
            encoded = encoder.whole(samples[number])
        except DataError as error:
            if config.data.on_error == "raise":
                raise
            logging.log_first_n(logging.WARNING, "left out: %s", 20, error)
            continue
        tokens[number], images[number] = len(encoded.tokens), len(encoded.image_positions)
    return tokens, images


def fingerprint(config: Config, stage: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """Changes with whatever changes the counts of the same samples: tokenizer, template, system prompt."""
    template = find_template(config.stage(stage).template)
    parts = (tokenizer.backend_tokenizer.to_str(), repr(template), repr(config.data.system_prompt))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _with_progress(total: int, stage: str) -> Iterator[int]:
    """0..total - 1, with a line now and then."""
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
