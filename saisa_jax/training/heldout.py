"""Held-out loss and a few generated answers while training; nothing here touches the data's position or the state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from saisa_jax import parallel
from saisa_jax.batch import Batch, HostBatch
from saisa_jax.config import ModelConfig, StageConfig
from saisa_jax.data.text.conversation import end_token_id
from saisa_jax.inference.generate import Generator
from saisa_jax.training.optimizer import merge
from saisa_jax.training.state import TrainState
from saisa_jax.training.step import make_eval_step


class HeldOut:
    """Evaluates a state on fixed held-out batches.

    Args:
      batches: of the held-out split, made once.
      samples: how many of the first rows to answer by generation.
      loss_chunk: positions of a row that have logits at the same time; 0: all.
    """

    def __init__(
        self,
        config: ModelConfig,
        stage: StageConfig,
        batches: Sequence[HostBatch],
        tokenizer: Any,
        mesh: Mesh,
        samples: int = 3,
        max_new_tokens: int = 16,
        loss_chunk: int = 0,
    ):
        self._batches = [parallel.to_device(host.batch, mesh) for host in batches]
        self._step = make_eval_step(config, loss_chunk)
        self._generator = Generator(config, [end_token_id(stage.template, tokenizer)])
        self._tokenizer, self._max_new_tokens = tokenizer, max_new_tokens
        self._truths, self._ids = [], []
        if batches and samples:
            self._ids = [sample_id for row in batches[0].sample_ids[:samples] for sample_id in row]
            self._batch, self._truths = first_answers(batches[0].batch, len(self._ids))

    def __call__(self, state: TrainState) -> dict[str, Any]:
        """{"loss": mean over all held-out tokens, "samples": [{"id", "question", "answer", "truth"}]}."""
        sums = [self._step(state.trainable, state.frozen, batch) for batch in self._batches]
        total, weight = (float(sum(part)) for part in zip(*sums, strict=True))
        return {"loss": total / max(weight, 1.0), "samples": self._answers(state)}

    def _answers(self, state: TrainState) -> list[dict[str, str]]:
        if not self._ids:
            return []
        tokens = self._generator(merge(state.trainable, state.frozen), self._batch, self._max_new_tokens)
        decode = lambda ids: self._tokenizer.decode(ids, skip_special_tokens=True).strip()  # noqa: E731
        prompts = (row[mask > 0] for row, mask in zip(self._batch["tokens"], self._batch["segment_ids"], strict=True))
        rows = zip(self._ids, prompts, tokens, self._truths, strict=True)
        return [{"id": i, "question": decode(p), "answer": decode(a), "truth": decode(t)} for i, p, a, t in rows]


def first_answers(batch: Batch, rows: int) -> tuple[Batch, list[np.ndarray]]:
    """Prompts of the first rows, cut before their first supervised token, and the answers that follow there."""
    prompts: Batch = jax.tree.map(lambda x: np.array(x[:rows]), batch)  # type: ignore[assignment]
    truths = []
    for row in range(len(prompts["tokens"])):
        supervised = prompts["loss_weights"][row] > 0
        first = int(np.argmax(supervised))
        length = int(np.argmin(supervised[first:])) or supervised.size - first
        truths.append(prompts["targets"][row, first : first + length])
        for name in ("tokens", "positions", "segment_ids"):
            prompts[name][row, first + 1 :] = 0  # the token at `first` predicts the first supervised one
        later = prompts["image_positions"][row] > prompts["positions"][row, first]
        prompts["image_segment_ids"][row, later] = 0
    return prompts, truths
