"""Keys and values of a prompt's places up to the end of its last picture, from the model into the store.

A picture's are `model.encode_images`, rotated to its position; those of the text before and between pictures are the
model's own prefill. Nothing is computed that the store has: a second question about a picture at the same place costs
nothing here, and one about it at another place a rotation.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from saisa_jax.checkpoints import checksums
from saisa_jax.config import ConfigError
from saisa_jax.convert.files.safetensors import NAMES, write_file
from saisa_jax.data.text.conversation import Encoded
from saisa_jax.inference.generate import ImageSlots
from saisa_jax.inference.image_cache import EncodedImage
from saisa_jax.inference.model import Request, VisionLanguageModel
from saisa_jax_vllm.runs import Run, digest
from saisa_jax_vllm.store import Store

# In prompt_token_ids where a visual token stands. It is never looked up: its keys and values are loaded.
PLACEHOLDER = 0


def check_served(model: VisionLanguageModel) -> None:
    """Raises ConfigError for a model that a stock decoder, with what can be put into its cache, does not compute."""
    config, instead = model.model_config, "`python -m saisa_jax serve` answers with it"
    if config.alignment not in ("saisa", "naavit"):
        llava = "its visual tokens depend on the text before them, so that no picture is encoded ahead"
        reason = llava if config.alignment == "llava" else f"it has layers that no stock decoder has; {instead}"
        raise ConfigError(f"model.alignment={config.alignment}: {reason}; vLLM serves saisa and naavit")
    if len(config.visible_layers) < config.num_layers:
        unseen = sorted(set(range(config.num_layers)) - set(config.visible_layers))
        raise ConfigError(
            f"model.visual_layers leaves out {unseen}: every layer of a stock decoder attends to every place of its "
            f"cache, and no key is one that nothing attends to; {instead}"
        )
    if config.frozen_prefix or model.config.data.blind:
        name = "model.frozen_prefix" if config.frozen_prefix else "data.blind"
        raise ConfigError(f"{name}: a stock decoder has no such text, which attends to less than all; {instead}")


@dataclasses.dataclass(frozen=True)
class _Stretch:
    """Places of a prompt that are a picture (its slot) or text (None)."""

    start: int
    places: int
    slot: int | None


def stretches(encoded: Encoded, per_image: int) -> Iterator[_Stretch]:
    """A prompt up to the end of its last picture."""
    at = 0
    for slot, begin in enumerate(map(int, encoded.image_positions)):
        if begin > at:
            yield _Stretch(at, begin - at, None)
        yield _Stretch(begin, per_image, slot)
        at = begin + per_image


def prompt_of(encoded: Encoded) -> list[int]:
    """A prompt as vLLM counts it: a token for each place."""
    ids = np.full(encoded.length, PLACEHOLDER, np.int64)
    ids[encoded.positions] = encoded.tokens
    return ids.tolist()


class Prefixes:
    """Makes them, and lays them into the store. Threads may share it; one at a time computes.

    Args:
      model: of alignment saisa or naavit, whose layers all see the pictures.
      store: where they go.
    """

    def __init__(self, model: VisionLanguageModel, store: Store) -> None:
        check_served(model)
        self._model, self._store = model, store
        self._of_model = digest(sorted(checksums(model.params).items()), repr(model.model_config))
        self._lock = threading.Lock()

    def runs(self, request: Request) -> list[Run]:
        """What the store has to hold for a request."""
        found, before, encoded = [], self._of_model, request.encoded
        for stretch in stretches(encoded, self._model.model_config.num_visual_tokens):
            if stretch.slot is None:
                key = before = digest("text", before, _tokens(encoded, stretch).tolist())
            else:
                key = digest("picture", self._of_model, request.images[stretch.slot].key, stretch.start)
                before = digest("after", before, key)
            found.append(Run(key, stretch.places))
        return found

    def make(self, request: Request, runs: list[Run]) -> int:
        """Computes what the store lacks; the caller holds its keys. Returns places of pictures that it had."""
        of = list(stretches(request.encoded, self._model.model_config.num_visual_tokens))
        with self._lock:
            missing = {run.key: stretch for run, stretch in zip(runs, of, strict=True) if not self._store.has(run.key)}
            with self._model.on_mesh():
                for key, stretch in missing.items():
                    if stretch.slot is not None:
                        self._store.put(key, _writer(*self._picture(request.images[stretch.slot], stretch.start)))
                texts = [(key, stretch) for key, stretch in missing.items() if stretch.slot is None]
                if texts:
                    cache = self.prefill(_up_to(request, of[-1]))[1]
                    for key, stretch in texts:
                        columns = slice(*np.searchsorted(request.encoded.positions, (stretch.start, _end(stretch))))
                        self._store.put(key, _writer(cache.k[:, 0, :, columns], cache.v[:, 0, :, columns]))
        kept = [stretch for run, stretch in zip(runs, of, strict=True) if run.key not in missing]
        return sum(stretch.places for stretch in kept if stretch.slot is not None)

    def prefill(self, request: Request) -> tuple[Any, Any]:
        """Logits [1, W] after a prompt, and its cache."""
        images = tuple(self._model.encode_images(request.images))
        request = dataclasses.replace(request, images=images)
        batch = self._model.batch([request])
        logits, cache, _ = self._model.generator.prefill(
            self._model.params, batch, 0, self._model.image_slots(batch, [request])
        )
        return logits, cache

    def _picture(self, image: EncodedImage, position: int) -> tuple[Any, Any]:
        """Keys, rotated, and values [L, K, P, H]."""
        kv = self._model.encode_images([image])[0].kv
        assert kv is not None
        where: Any = {"image_positions": np.full((1, 1), position, np.int32)}
        where["image_segment_ids"] = np.ones((1, 1), np.int32)
        slots = ImageSlots((kv,), np.zeros((1, 1), np.int32))
        placed = self._model.generator.place(self._model.params, where, slots)
        return placed.k[:, 0], placed.v[:, 0]


def _end(stretch: _Stretch) -> int:
    return stretch.start + stretch.places


def _tokens(encoded: Encoded, stretch: _Stretch) -> Any:
    first, last = np.searchsorted(encoded.positions, (stretch.start, _end(stretch)))
    return encoded.tokens[first:last]


def _up_to(request: Request, last: _Stretch) -> Request:
    """The request without what follows its last picture."""
    encoded = request.encoded
    count = int(np.searchsorted(encoded.positions, _end(last)))
    text = {name: getattr(encoded, name)[:count] for name in ("tokens", "targets", "loss_weights", "positions")}
    return dataclasses.replace(request, encoded=dataclasses.replace(encoded, length=_end(last), **text))


def _writer(k: Any, v: Any) -> Any:
    """Writes keys and values [L, K, places, H] to a path, as [L, places, K, H]."""
    arrays = {"k": np.asarray(k).swapaxes(1, 2), "v": np.asarray(v).swapaxes(1, 2)}
    tensors = [(name, NAMES[array.dtype], array.shape) for name, array in arrays.items()]

    def write(path: Path) -> None:
        write_file(path, tensors, arrays.__getitem__)

    return write
