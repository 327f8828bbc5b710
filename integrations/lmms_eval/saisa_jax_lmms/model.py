"""The two classes that lmms-eval asks: messages with pictures at their places (chat), or a text with pictures (simple).

Both make `Conversation`s of their requests; how these are answered is written once. Answers come in batches of one
setting, of like length; the last batch is filled, so that it compiles nothing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging
from lmms_eval.api.model import lmms
from PIL import Image

import saisa_jax
from saisa_jax.data.sample import USER, Turn
from saisa_jax.errors import UserError
from saisa_jax.inference.generate import Sampling
from saisa_jax.inference.model import Conversation

IMAGE = "<image>"
SERVED = ("max_new_tokens", "temperature", "top_p", "do_sample", "num_beams", "until", "seed")
DEFAULT_UNTIL = "\n\n"  # lmms-eval's own for every task that names none: it would cut an answer of two paragraphs


class UnservedError(UserError):
    """lmms-eval asked for what this model does not do."""


class SaisaJax(lmms):
    """What chat and simple have in common.

    Args (`--model_args name=value,...`):
      checkpoint: whatever `saisa_jax.load` takes: a workdir, a model's directory, a Hugging Face directory.
      batch_size: questions that are answered at once; `--batch_size` gives it.
      dtype, quantize: as `saisa_jax.load`.
      max_new_tokens: an upper bound on what tasks ask for, for a model of a short `max_length`.
      on_error: raise: a question that cannot be asked stops the run; empty: its answer is "", which the log tells of.
      device: lmms-eval gives one; JAX chooses its own.
    """

    def __init__(
        self,
        checkpoint: str = "",
        batch_size: int | str = 1,
        dtype: str | None = None,
        quantize: str | None = None,
        max_new_tokens: int | str | None = None,
        on_error: str = "raise",
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        del device
        if not checkpoint or unknown:
            seen = f"has no {', '.join(unknown)}" if unknown else "needs a checkpoint"
            raise UnservedError(
                f"--model saisa_jax {seen}: --model_args checkpoint=DIR[,dtype=...,quantize=...,max_new_tokens=...,"
                "on_error=raise|empty]"
            )
        if on_error not in ("raise", "empty"):
            raise UnservedError(f"on_error={on_error!r} is neither raise nor empty")
        if jax.process_count() > 1:
            raise UnservedError(
                "lmms-eval deals questions to processes that answer at their own pace, and one model over several "
                "hosts cannot: start a process for each model, or use eval.py, which serves pods"
            )
        if not str(batch_size).isdigit() or not int(batch_size):
            raise UnservedError(f"--batch_size={batch_size} is not a number from 1 on")
        self.batch_size = int(batch_size)
        self.most_tokens = None if max_new_tokens is None else int(max_new_tokens)
        self.on_error, self.told = on_error, set[str]()
        self.model = saisa_jax.load(checkpoint, dtype=dtype, quantize=quantize)

    def conversation(self, args: tuple[Any, ...]) -> Conversation:
        """What a request asks."""
        raise NotImplementedError

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer to each request."""
        settings = 1 if self.is_simple else 2  # the place of gen_kwargs among a request's arguments
        asked = [self.conversation(request.args) for request in requests]
        answers = [""] * len(asked)
        order = sorted(range(len(asked)), key=lambda i: (_key(requests[i].args[settings]), _length(asked[i]), i))
        for _, alike in itertools.groupby(order, key=lambda i: _key(requests[i].args[settings])):
            numbers = list(alike)
            given = dict(requests[numbers[0]].args[settings] or {})
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                filled = [*batch, *batch[-1:] * (min(self.batch_size, len(numbers)) - len(batch))]
                for number, answer in zip(batch, self._answer([asked[i] for i in filled], given), strict=False):
                    answers[number] = answer
                    self.cache_hook.add_partial("generate_until", requests[number].args[:2], answer)
        return answers

    def _answer(self, asked: Sequence[Conversation], given: Mapping[str, Any]) -> list[str]:
        for name in given:
            if name not in SERVED and given[name] is not None and name not in self.told:
                self.told.add(name)
                logging.warning("lmms-eval's %s=%r is not served, and has no effect", name, given[name])
        if (given.get("num_beams") or 1) > 1:
            raise UnservedError(f"num_beams={given['num_beams']} is not served: --gen_kwargs num_beams=1")
        wanted = int(given.get("max_new_tokens") or 128)
        tokens = wanted if self.most_tokens is None else min(wanted, self.most_tokens)
        greedy = given.get("do_sample") is False
        sampling = Sampling(0.0 if greedy else float(given.get("temperature") or 0), float(given.get("top_p") or 1))
        how = "raise" if self.on_error == "raise" else "return"
        answers = self.model.answer(asked, tokens, sampling, int(given.get("seed") or 0), how)
        for answer in answers:
            if not isinstance(answer, str):
                logging.warning("not asked, and its answer is empty: %s", answer)
        return [cut(answer, given.get("until")) if isinstance(answer, str) else "" for answer in answers]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise UnservedError("loglikelihood is not served: choose a task of output_type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise UnservedError("tasks of several rounds are not served: choose one of output_type generate_until")


class SaisaJaxChat(SaisaJax):
    """Requests of (text, doc_to_messages, gen_kwargs, doc_id, task, split)."""

    is_simple = False

    def conversation(self, args: tuple[Any, ...]) -> Conversation:
        _, doc_to_messages, _, doc_id, task, split = args
        return from_messages(doc_to_messages(self.task_dict[task][split][doc_id]), f"{task}/{doc_id}")


class SaisaJaxSimple(SaisaJax):
    """Requests of (text, gen_kwargs, doc_to_visual, doc_id, task, split)."""

    is_simple = True

    def conversation(self, args: tuple[Any, ...]) -> Conversation:
        text, _, doc_to_visual, doc_id, task, split = args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual else None
        images = tuple(_image(visual, f"{task}/{doc_id}") for visual in visuals or ())
        return Conversation((Turn(USER, text),), images, name=f"{task}/{doc_id}")


def from_messages(messages: Sequence[Mapping[str, Any]], name: str) -> Conversation:
    """Chat messages as the model reads them.

    Pictures in front of a conversation's words stand where the model was trained to have them; others stay where they
    are, on a line of their own.
    """
    turns, images, system = [], [], None
    for message in messages:
        parts = message["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        words = []
        for part in parts:
            if part["type"] == "text":
                words.append(part["text"])
            else:
                images.append(_image(part.get("url") if part["type"] == "image" else part["type"], name))
                words.append(IMAGE)
        if message["role"] == "system":
            system = "\n".join(words)
        else:
            turns.append((message["role"], words))
    leading = len(list(itertools.takewhile(lambda word: word == IMAGE, turns[0][1])))
    if leading == len(images):  # without marks they stand in front
        turns[0] = (turns[0][0], turns[0][1][leading:])
    return Conversation(tuple(Turn(role, "\n".join(words)) for role, words in turns), tuple(images), system, name)


def cut(answer: str, until: Any) -> str:
    """The answer up to the first of the texts that end it, but for lmms-eval's default."""
    ends = [until] if isinstance(until, str) else list(until or ())
    for end in ends:
        if end and end != DEFAULT_UNTIL:
            answer = answer.split(end)[0]
    return answer


def _image(visual: Any, name: str) -> Any:
    if isinstance(visual, Image.Image | bytes) or (isinstance(visual, str) and visual not in ("video", "audio")):
        return visual
    kind = visual if isinstance(visual, str) else type(visual).__name__
    raise UnservedError(f"{name} shows a {kind}: text and images are served")


def _key(settings: Any) -> str:
    return json.dumps(settings, sort_keys=True, default=str)


def _length(asked: Conversation) -> int:
    return sum(len(turn.text) for turn in asked.turns)
