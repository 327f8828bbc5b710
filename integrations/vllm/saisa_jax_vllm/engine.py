"""An engine for the routes of `saisa_jax.serving.app` that has vLLM answer.

A question becomes token ids with a place for each visual token, the runs of places that vLLM is to load, and a salt;
vLLM's tokens become text here, as those of `python -m saisa_jax serve` do. A thread waits for each answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from absl import logging

from saisa_jax.config import ConfigError
from saisa_jax.data.sample import USER, Turn
from saisa_jax.inference.image_cache import EncodedImage
from saisa_jax.inference.model import Request, VisionLanguageModel
from saisa_jax.serving.questions import (
    CLOSING,
    OVERDUE,
    Ended,
    Event,
    Failed,
    OverdueError,
    Question,
    Telling,
    Ticket,
    UnavailableError,
)
from saisa_jax_vllm.client import Client, Stream, UnreachableError, VllmError
from saisa_jax_vllm.prefixes import Prefixes, prompt_of
from saisa_jax_vllm.runs import digest, to_params
from saisa_jax_vllm.store import Store

WATCH = 2.0  # seconds between two looks whether vLLM is there
ALIKE = 5  # so many of vLLM's most likely tokens are compared


class MismatchError(ConfigError):
    """vLLM serves another model, or without the connector."""


class VllmEngine:
    """Answers by asking vLLM (`saisa_jax.serving.questions.Answers`).

    Args:
      model: of alignment saisa or naavit.
      client: where vLLM serves the decoder of that model.
      store: that its connector reads.
      count: of questions at once; vLLM's --max-num-seqs, or more.
      max_images: of a question.
      tolerance: by how much log-probabilities of the two may differ.
      wait: seconds for vLLM to come up.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        client: Client,
        store: Store,
        count: int = 256,
        max_images: int = 4,
        tolerance: float = 0.25,
        wait: float = 600.0,
    ) -> None:
        self.model, self.client, self.store = model, client, store
        self.prefixes = Prefixes(model, store)
        fitting = (model.model_config.max_length - 1) // model.model_config.num_visual_tokens
        self.count, self.max_images = count, min(max_images * model.model_config.vision.max_views, fitting)
        self.ready = threading.Event()
        self.warmed = (0, 1)
        self.prompt_tokens = self.generated_tokens = 0
        self._tolerance, self._wait = tolerance, wait
        self._name = ""
        self._waiting: set[Ticket] = set()
        self._busy: dict[Ticket, Stream | None] = {}
        self._changed = threading.Condition(threading.RLock())  # of these; a signal's handler drains
        self._closing = False
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="answer")

    # --- what the routes need -----------------------------------------------------------------------------------------

    @property
    def counters(self) -> Iterator[tuple[str, str, float]]:
        """(name, about, value) of what only grows."""
        yield "prompt_tokens", "positions of prompts, visual tokens included", self.prompt_tokens
        yield "generated_tokens", "tokens of answers", self.generated_tokens
        yield "runs_stored", "runs of places that were computed and laid into the store", self.store.written

    @property
    def alive(self) -> bool:
        """Whether it goes on answering."""
        return not self._closing or bool(self._busy)

    @property
    def closing(self) -> bool:
        """Whether it takes no more questions."""
        return self._closing

    @property
    def waiting(self) -> int:
        """Questions that no thread waits for yet."""
        return len(self._waiting)

    @property
    def busy(self) -> int:
        """Questions that are being answered."""
        return len(self._busy)

    def start(self) -> None:
        """Waits for vLLM, and compares what it says with the model; then questions are taken.

        Raises:
          MismatchError: it says something else, or does not come up.
        """
        end = time.monotonic() + self._wait
        while True:
            try:
                self.compare()
                break
            except (UnreachableError, VllmError, TimeoutError) as error:
                if (
                    isinstance(error, VllmError) and error.status < 500
                ):  # waiting mends nothing: a wrong key, no such route
                    raise MismatchError(f"--vllm={self.client.url}: {error}") from error
                if time.monotonic() > end:
                    raise MismatchError(f"--vllm: {error} (waited for {self._wait:g} s)") from error
                time.sleep(1)
        self.warmed = (1, 1)
        self.ready.set()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def submit(self, question: Question, listen: Callable[[Event], None]) -> Ticket:
        """As of `Answers`."""
        if self._closing:
            raise UnavailableError(CLOSING)
        if not self.ready.is_set():
            raise UnavailableError(f"vLLM at {self.client.url} does not answer")
        ticket = Ticket(question, listen)
        with self._changed:
            self._waiting.add(ticket)
        self._pool.submit(self._run, ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends the answer of a ticket, in vLLM as well."""
        ticket.cancelled = True
        with self._changed:
            stream = self._busy.get(ticket)
        if stream is not None:
            stream.close()

    def drain(self) -> None:
        """Takes no more questions, refuses those that wait, and ends when the others are answered."""
        with self._changed:
            self._closing = True
            refused, self._waiting = self._waiting, set()
        for ticket in refused:
            ticket.tell(Failed(UnavailableError(CLOSING)))

    def join(self, timeout: float | None = None) -> None:
        """Waits for the end after `drain`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy, timeout)

    # --- an answer ----------------------------------------------------------------------------------------------------

    def _run(self, ticket: Ticket) -> None:
        with self._changed:
            if ticket not in self._waiting:  # refused
                return
            self._waiting.remove(ticket)
            self._busy[ticket] = None
        try:
            event = self._answer(ticket)
        except TimeoutError:
            event = Failed(OverdueError(OVERDUE))
        except UnreachableError as error:
            logging.error("%s", error)
            event = Failed(UnavailableError(str(error)))
        except Exception as error:
            logging.exception("a question is not answered")
            event = Failed(error)
        if not ticket.cancelled:
            ticket.tell(event)
        with self._changed:
            del self._busy[ticket]
            self._changed.notify_all()

    def _answer(self, ticket: Ticket) -> Event:
        question, request = ticket.question, ticket.question.request
        runs = self.prefixes.runs(request)
        self.prompt_tokens += request.encoded.length
        telling = Telling(ticket, self.model)
        with self.store.holding([run.key for run in runs]):
            for last in (False, True):
                if ticket.cancelled:
                    break
                if time.monotonic() > question.deadline:
                    raise TimeoutError
                cached = self.prefixes.make(request, runs)
                try:
                    reason = self._read(ticket, telling, self._body(question, runs))
                    return Ended(reason, len(telling.tokens), cached)
                except VllmError as error:
                    if last or error.status < 500 or not runs or telling.tokens:
                        raise
                    # The connector could not load: files that went away, or were cut. They are made again, once.
                    logging.warning("%s; the keys and values of its pictures are computed again", error)
                    for run in runs:
                        self.store.forget(run.key)
        return Ended("", 0, 0)  # nobody listens

    def _read(self, ticket: Ticket, telling: Telling, body: dict[str, Any]) -> str:
        """Tells the answer; why it ended."""
        stream = Stream(self.client, body, ticket.question.deadline)
        with self._changed:
            self._busy[ticket] = stream
        if ticket.cancelled:
            stream.close()
        try:
            for token in stream:
                had = len(telling.tokens)
                reason = telling.take(token)
                self.generated_tokens += len(telling.tokens) - had
                if reason:
                    return reason
        finally:
            stream.close()
        if not ticket.cancelled:
            raise UnreachableError(f"vLLM at {self.client.url} ended an answer after {len(telling.tokens)} tokens")
        return ""

    def _body(self, question: Question, runs: Any) -> dict[str, Any]:
        """Of a request to vLLM. What its generation_config.json might set otherwise is said."""
        temperature, top_p = question.sampling
        body = {
            "model": self._name,
            "prompt": prompt_of(question.request.encoded),
            "max_tokens": question.max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": question.seed,
            "ignore_eos": question.ignore_eos,
            "stop_token_ids": [] if question.ignore_eos else list(self.model.generator.eos_ids),
        }
        if runs:
            body["kv_transfer_params"] = to_params(runs)
            body["cache_salt"] = digest([run.key for run in runs])
        return body

    # --- is it the same model? ----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Takes no questions while vLLM is away, and compares again when it comes back."""
        while not self._closing:
            time.sleep(WATCH)
            try:
                self.client.get("/health")
                if not self.ready.is_set():
                    self.compare()
                    self.ready.set()
            except (UnreachableError, VllmError, TimeoutError, ConfigError) as error:
                if self.ready.is_set():
                    logging.error("no more questions are taken: %s", error)
                self.ready.clear()

    def compare(self) -> None:
        """Asks vLLM a question without a picture, and one about noise that no cache has seen.

        Raises:
          UnreachableError, VllmError, TimeoutError: it does not answer yet.
          MismatchError: its log-probabilities are not the model's, or its prompts may not be as long.
        """
        self.client.get("/health")
        found = self.client.get("/v1/models")["data"][0]
        self._name, longest = found["id"], found.get("max_model_len")
        ours = self.model.model_config.max_length
        if longest is not None and longest < ours:
            raise MismatchError(
                f"vLLM takes {longest} positions, and the model {ours}: start it with --max-model-len={ours}"
            )
        text = self._difference([])
        if text > self._tolerance:
            raise MismatchError(
                f"vLLM at {self.client.url} serves another model than --checkpoint: log-probabilities of a first token "
                f"differ by {text:.3g} (--tolerance={self._tolerance:g}); it is to serve what `python -m saisa_jax "
                "convert export --layout=hf-llm` has written of this checkpoint"
            )
        size, difference = self.model.model_config.vision.image_size, 0.0
        if self.max_images and "vision" in self.model.params:
            noise = np.random.default_rng().integers(0, 256, (size, size, 3), dtype=np.uint8)
            difference = self._difference([EncodedImage.of(noise)])
        if difference > self._tolerance:
            raise MismatchError(
                f"vLLM agrees with --checkpoint on text, and not on a picture: log-probabilities differ by "
                f"{difference:.3g} (--tolerance={self._tolerance:g}): is it started with the connector, and of the "
                "version that was tested with it? Its log says"
            )
        logging.info("vLLM agrees: log-probabilities differ by %.2g on text, %.2g on a picture", text, difference)

    def _difference(self, images: list[EncodedImage]) -> float:
        """How far vLLM's most likely first tokens are from what the model says of them."""
        request: Request = self.model.request((Turn(USER, "What is this?"),), images)
        runs = self.prefixes.runs(request)
        with self.store.holding([run.key for run in runs]):
            self.prefixes.make(request, runs)
            body = self._body(Question(request, 1), runs) | {"logprobs": ALIKE, "return_tokens_as_token_ids": True}
            try:
                said = self.client.complete(body)["choices"][0]["logprobs"]["top_logprobs"][0]
            except VllmError as error:
                hint = f"; does its connector read this store ({self.store.folder})?" if runs else ""
                raise MismatchError(f"{error}{hint} Its log says why") from error
        with self.model.on_mesh():
            logits = self.prefixes.prefill(request)[0]
        ours = np.asarray(jax.nn.log_softmax(logits[0]))
        return max(abs(float(ours[int(name.rpartition(":")[2])]) - value) for name, value in said.items())
