"""A finished model and everything that it needs to answer: parameters, configuration, tokenizer, template."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from saisa_jax.batch import Batch
from saisa_jax.checkpoints import load_model
from saisa_jax.config import Config, ModelConfig, StageConfig
from saisa_jax.data.conversation import Encoded, check_length, encode_prompt, end_token_id
from saisa_jax.data.images import load_image, prepare_image
from saisa_jax.data.packing import pack_rows
from saisa_jax.data.sample import USER, Turn
from saisa_jax.inference.generate import Generator, Sampling, bucket
from saisa_jax.models.saisa import Saisa


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What `load` gives: ask it with `generate`.

    Attributes:
      params: the parameters.
      config: the configuration of the run that made them.
      tokenizer: a Hugging Face tokenizer.
      stage: the last stage of training, whose template the model knows.
      metadata: what was written beside the parameters.
    """

    params: Any
    config: Config
    tokenizer: Any
    stage: str
    metadata: dict[str, Any]

    @property
    def model(self) -> ModelConfig:
        return self.config.model_for(self.stage)

    @property
    def stage_config(self) -> StageConfig:
        return self.config.stage(self.stage)

    @functools.cached_property
    def generator(self) -> Generator:
        return Generator(self.model, [end_token_id(self.stage_config.template, self.tokenizer)])

    def prompts(self, questions: Sequence[str], images: Sequence[Sequence[Any]]) -> tuple[Batch, list[Encoded]]:
        """Questions with their images as one batch of prompts, padded to a bucket of rows and of text length.

        Args:
          questions: one a row; `<image>` says where an image stands, otherwise images stand before the question.
          images: for each question its images: paths, bytes or PIL images.
        """
        if not questions:
            raise ValueError("no questions")
        if len(questions) != len(images):
            raise ValueError(f"{len(questions)} questions came with {len(images)} lists of images; give one list each")
        vision, data = self.model.vision, self.config.data
        encoded, pixels = [], []
        for number, (question, sources) in enumerate(zip(questions, images, strict=True)):
            name = f"question {number}"
            encoded.append(
                encode_prompt(
                    (Turn(USER, question),),
                    self.stage_config.template,
                    self.tokenizer,
                    vision.num_patches,
                    num_images=len(sources),
                    system_prompt=data.system_prompt,
                    sample_id=name,
                )
            )
            check_length(encoded[-1], len(encoded[-1].tokens), self.model.max_length)
            loaded = (load_image(source, name) for source in sources)
            prepared = [prepare_image(x, vision.image_size, vision.image_mode, vision.image_mean) for x in loaded]
            pixels.append(None if data.blind else prepared)
        batch = pack_rows(
            encoded,
            pixels,
            rows=bucket(len(encoded), smallest=1),
            text_length=bucket(max(len(row.tokens) for row in encoded)),
            max_images=max(len(row.image_positions) for row in encoded),
            image_size=vision.image_size,
        )
        return batch, encoded

    def generate(
        self,
        questions: Sequence[str],
        images: Sequence[Sequence[Any]],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Answers, one for each question."""
        batch, encoded = self.prompts(questions, images)
        tokens = self.generator(self.params, batch, max_new_tokens, Sampling(temperature, top_p), seed)
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens[: len(encoded)]]

    def attention(self, question: str, images: Sequence[Any]) -> Float[np.ndarray, "L V"]:
        """How much the answer's first token reads each visual token, by layer, averaged over heads.

        It is the attention of the prompt's last token, from which the answer's first token is predicted.
        """
        batch, encoded = self.prompts([question], [images])
        last = len(encoded[0].tokens) - 1
        weights = np.asarray(_attention(self.model, self.params, batch))  # [L, 1, N, T, V + T]
        visual = weights.shape[-1] - weights.shape[-2]
        return weights[:, 0, :, last, :visual].mean(axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _attention(model: ModelConfig, params: Any, batch: Batch) -> Any:
    return Saisa(model).apply({"params": params}, batch, capture=("attention",))[1]["attention"]


def load(directory: str) -> Bundle:
    """Loads a finished model (`WORKDIR/finetune/model`) onto the default device, whatever it was trained on.

    Raises:
      CheckpointError: no such directory, something else in it, or damaged files.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params, config, tokenizer, metadata = load_model(directory, sharding=device)
    return Bundle(params, config, tokenizer, metadata["stage"], metadata)
