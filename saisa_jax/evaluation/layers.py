"""How much each layer's reading of the picture matters to the answer.

Two measures of a trained model, over the tokens of the answers that it gives itself (of the correct one where it gives
none):

    attention   how much of a layer's attention is on visual tokens, averaged over heads (under Flamingo of the cross
                layer's before it: all of it, unless that reads the text as well)
    divergence  KL(p || p_l), in nats: p is what the model predicts, p_l what it predicts when the text does not attend
                to the picture in layer l (after ShortV, arXiv 2504.00502, which freezes visual tokens instead)

The layers of the largest divergence are a proposal for `model.visual_layers`; what it keeps is measured as well, with
all other layers hidden at once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from saisa_jax.batch import Batch
from saisa_jax.config import ConfigError, ModelConfig
from saisa_jax.data.rows.collate import Example, pack_rows
from saisa_jax.data.sample import ASSISTANT, USER, DataError, Turn
from saisa_jax.data.text.conversation import Encoded, encode
from saisa_jax.evaluation.tasks import Item
from saisa_jax.inference.generate import bucket
from saisa_jax.inference.model import Conversation, VisionLanguageModel
from saisa_jax.inference.quantize import variables_of
from saisa_jax.models.saisa import Saisa


@dataclasses.dataclass(frozen=True)
class LayerUse:
    """What was measured.

    Attributes:
      attention: of each layer, 0 to 1.
      divergence: of each layer, in nats a token.
      proposal: the layers of the largest divergence, in order.
      kept: divergence with the picture hidden in all layers but these.
      blind: divergence with the picture hidden in all layers.
      questions: answered.
      tokens: of their answers.
    """

    attention: Float[np.ndarray, " L"]
    divergence: Float[np.ndarray, " L"]
    proposal: tuple[int, ...]
    kept: float
    blind: float
    questions: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Answered questions, on the device: the places of the tokens that predict the answers, and what is predicted."""

    batch: Batch
    features: Any  # [B, V, C]
    places: Any  # [B, A]
    weights: Any  # [B, A]: 1 at an answer's token
    log_probs: Any  # [B, A, W]


def measure(
    model: VisionLanguageModel,
    items: Sequence[Item],
    keep: int,
    batch_size: int = 4,
    max_new_tokens: int = 16,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> LayerUse:
    """Answers questions about pictures, and measures the layers on these answers.

    Args:
      model: with a vision encoder.
      items: questions; those without a picture are left out.
      keep: how many layers to propose.
      batch_size: questions at once.
      max_new_tokens: of an answer.
      progress: is told (what is being done, batches done, of how many).

    Raises:
      ConfigError: more layers to keep than there are, or a model that sees no pictures.
      DataError: no question has a picture and an answer.
    """
    if model.config.data.blind:
        raise ConfigError(f"{model.config.name} was trained blind (data.blind): it sees no picture in any layer")
    config = model.model_config
    seen = np.isin(np.arange(config.num_layers), config.visible_layers)
    if not 1 <= keep <= seen.sum():
        raise ConfigError(f"--keep={keep} is not a number of layers that see the picture: 1 to {seen.sum()}")
    items = [item for item in items if item.images]
    attention, divergence = np.zeros(len(seen)), np.zeros(len(seen))
    rows, tokens, questions = [], 0, 0
    total = -(-len(items) // batch_size)
    for done in range(total):
        progress("answering", done, total)
        found = _answered(model, items[done * batch_size : (done + 1) * batch_size], batch_size, max_new_tokens)
        if found is not None:
            with model.on_mesh():
                rows.append(_begin(config, model.params, *found))
                mass, count = _attention(config, model.params, rows[-1])
            attention, tokens = attention + mass, tokens + count
            questions += int((found[1] > 0).any(axis=1).sum())
    if not rows:
        raise DataError("no question has a picture and an answer: name others with --task and --data")

    def hidden(layers: Bool[np.ndarray, " L"]) -> float:
        with model.on_mesh():
            return sum(float(_divergence(config, model.params, row, layers)) for row in rows) / tokens

    for layer in np.flatnonzero(seen):
        progress("layers", int(layer), len(seen))
        divergence[layer] = hidden(np.arange(len(seen)) == layer)
    proposal = tuple(sorted(np.argsort(-divergence, kind="stable")[:keep].tolist()))
    others = ~np.isin(np.arange(len(seen)), proposal)
    progress("layers", len(seen), len(seen))
    kept, blind = hidden(others), hidden(np.ones_like(seen))
    return LayerUse(attention / tokens, divergence, proposal, kept, blind, questions, tokens)


def _answered(
    model: VisionLanguageModel, items: Sequence[Item], batch_size: int, max_new_tokens: int
) -> tuple[Batch, np.ndarray, np.ndarray] | None:
    """A batch of questions with the model's own answers, the places that predict these, and their weights."""
    asked = [
        Conversation((*item.before, Turn(USER, item.question)), item.images, item.system, item.id) for item in items
    ]
    answers = model.answer(asked, max_new_tokens)
    answers = [
        given if given.strip() else next(iter(item.answers), "") for given, item in zip(answers, items, strict=True)
    ]
    examples = list(_examples(model, asked, answers))
    if not examples:
        return None
    longest = bucket(max(len(example.encoded.tokens) for example in examples))
    slots = max(len(example.encoded.image_positions) for example in examples)
    size = model.model_config.vision.image_size
    batch = pack_rows([[example] for example in examples], longest, slots, size, count=batch_size)
    supervised = batch["loss_weights"] > 0
    most = bucket(int(supervised.sum(axis=1).max()), smallest=1)
    places = np.argsort(~supervised, axis=1, kind="stable")[:, :most]
    return batch, np.take_along_axis(batch["loss_weights"], places, axis=1), places


def _examples(model: VisionLanguageModel, asked: Sequence[Conversation], answers: Sequence[str]) -> Iterator[Example]:
    for conversation, answer in zip(asked, answers, strict=True):
        if answer.strip():
            pixels = [view.pixels for image in model.encode_images(conversation.images) for view in image.views]
            yield Example(_encoded(model, conversation, answer), pixels)


def _encoded(model: VisionLanguageModel, conversation: Conversation, answer: str) -> Encoded:
    system, views = conversation.system, model.views_of(conversation.images, conversation.name)
    encoded = encode(
        (*conversation.turns, Turn(ASSISTANT, answer)),
        model.stage_config.template,
        model.tokenizer,
        model.model_config.num_visual_tokens,
        num_images=len(views),
        views=views,
        system_prompt=model.config.data.system_prompt if system is None else system,
        sample_id=conversation.name,
    )
    prompt = model.prompt(conversation.turns, views, 0, conversation.name, system)
    weights = encoded.loss_weights * (np.arange(len(encoded.tokens)) >= len(prompt.tokens) - 1)  # of this answer alone
    return dataclasses.replace(encoded, loss_weights=weights.astype(np.float32))


def _begin(config: ModelConfig, params: Any, batch: Batch, weights: np.ndarray, places: np.ndarray) -> _Rows:
    features = _features(config, params, batch["images"])
    none = np.zeros(config.num_layers, bool)
    log_probs = _log_probs(config, params, batch, features, places, none)
    return _Rows(batch, features, places, weights, log_probs)


def _apply(config: ModelConfig, params: Any, *args: Any, **options: Any) -> Any:
    plain = dataclasses.replace(config, attention_impl="xla")  # which alone has the weights, and can hide a layer's
    return Saisa(plain).apply(variables_of(params), *args, **options)


@functools.partial(jax.jit, static_argnums=0)
def _features(config: ModelConfig, params: Any, images: Any) -> Any:
    return _apply(config, params, images, method="encode_images")


@functools.partial(jax.jit, static_argnums=0)
def _image_attention(config: ModelConfig, params: Any, batch: Batch, features: Any, places: Any, weights: Any) -> Any:
    _, aux = _apply(config, params, batch, features, ("image_attention",), method="hidden")
    at_answers = jnp.take_along_axis(aux["image_attention"], places[None], axis=2)
    return jnp.sum(at_answers * weights, axis=(1, 2))


def _attention(config: ModelConfig, params: Any, rows: _Rows) -> tuple[np.ndarray, int]:
    """Sums over the answers' tokens, of each layer, and the number of tokens."""
    found = _image_attention(config, params, rows.batch, rows.features, rows.places, rows.weights)
    return np.asarray(found, np.float64), int(rows.weights.sum())


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(config: ModelConfig, params: Any, batch: Batch, features: Any, places: Any, unseen: Any) -> Any:
    hidden, _ = _apply(config, params, batch, features, unseen=unseen, method="hidden")
    hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
    logits = _apply(config, params, hidden, method="head")[..., : config.vocab_size]
    return jax.nn.log_softmax(logits, axis=-1)


@jax.jit
def _sum_of_kl(log_p: Any, log_q: Any, weights: Any) -> Any:
    return jnp.sum(weights * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def _divergence(config: ModelConfig, params: Any, rows: _Rows, unseen: np.ndarray) -> Any:
    """Summed over the answers' tokens."""
    other = _log_probs(config, params, rows.batch, rows.features, rows.places, unseen)
    return _sum_of_kl(rows.log_probs, other, rows.weights)
