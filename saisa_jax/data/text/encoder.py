"""One sample as tokens, with a stage's template, choice of turns and length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from absl import logging
from transformers import PreTrainedTokenizerFast

from saisa_jax.config import Config
from saisa_jax.data.sample import DataError, Sample, Samples, Turn
from saisa_jax.data.text.conversation import Encoded, check_length, encode, told_views, truncate
from saisa_jax.data.views import count_views


@dataclass(frozen=True)
class Encoder:
    """Encodes samples for one stage; the same for counting tokens, planning rows and reading them.

    Args:
      config: the run's.
      stage: pretrain or finetune.
      tokenizer: the run's.
    """

    config: Config
    stage: str
    tokenizer: PreTrainedTokenizerFast

    def whole(self, sample: Sample, rng: np.random.Generator | None = None) -> Encoded:
        """The sample in full; with `rng`, independent turns in a random order, as many as `turns_per_sample`.

        Raises:
          DataError: as `conversation.encode`; under any resolution, an image whose size cannot be read.
        """
        data, settings, vision = self.config.data, self.config.stage(self.stage), self.config.model.vision
        return encode(
            _chosen_turns(sample, data.turns_per_sample, rng),
            settings.template,
            self.tokenizer,
            self.config.model.num_visual_tokens,
            system_prompt=data.system_prompt if sample.system is None else sample.system,
            num_images=len(sample.images),
            views=[count_views(image, vision, sample.id) for image in sample.images],
            sample_id=sample.id,
        )

    def __call__(self, sample: Sample, rng: np.random.Generator | None = None) -> tuple[Encoded, int]:
        """The sample cut to what a row has room for, and how many tokens were cut off its end.

        Raises:
          DataError: as `whole`; too long where `data.on_long` does not truncate; more images than a row has slots.
        """
        settings, max_length = self.config.stage(self.stage), self.config.model.max_length
        encoded, cut = self.whole(sample, rng), 0
        if self.config.data.on_long == "truncate":
            encoded, cut = truncate(encoded, settings.text_length, max_length)
        check_length(encoded, settings.text_length, max_length)
        if len(encoded.image_positions) > settings.max_images:
            smaller = ", or choose smaller model.vision.image_grids" if self.config.model.vision.grids else ""
            raise DataError(
                f"{len(encoded.views)} images{told_views(encoded)} in a row of {settings.max_images} slots; raise "
                f"{self.stage}.max_images{smaller}",
                sample.id,
            )
        return encoded, cut


def warn_of_unknown_words(opened: Sequence[Samples], encoder: Encoder, look_at: int = 256) -> None:
    """Says in the log which share of the text is words that the tokenizer does not know.

    Args:
      opened: sources.
      encoder: of the stage.
      look_at: samples of each source, spread over it.
    """
    number, unknown, total = encoder.tokenizer.unk_token_id, 0, 0
    if number is None:
        return
    for samples in opened:
        for index in np.unique(np.linspace(0, len(samples) - 1, look_at).astype(int)):
            try:
                tokens = encoder.whole(samples[int(index)]).tokens
            except DataError:  # it is told of where the sample is used
                continue
            unknown, total = unknown + int((tokens == number).sum()), total + len(tokens)
    if unknown:
        logging.warning(
            "%s: %.1f%% of %s text tokens that were looked at are %r, words that the tokenizer does not know; is "
            "data.tokenizer=%r the model's own?",
            encoder.stage,
            100 * unknown / total,
            f"{total:,}",
            encoder.tokenizer.unk_token,
            encoder.config.data.tokenizer,
        )


def _chosen_turns(sample: Sample, limit: int | None, rng: np.random.Generator | None) -> list[Turn]:
    """The turns; if they are independent, in random order and at most `limit` questions with their answers."""
    turns = list(sample.turns)
    if not sample.independent_turns or rng is None:
        return turns
    order = rng.permutation(len(turns) // 2)[:limit]
    return [turn for pair in order for turn in turns[2 * pair : 2 * pair + 2]]
