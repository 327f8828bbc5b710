"""The front for vLLM, with a stand-in for vLLM that computes: a stock decoder that reads the store as a connector does.

So that what is wrong in a prompt's ids, in its runs, in their keys and values or in their positions is another answer.
`make vllm` compares with vLLM itself.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from saisa_jax.config import ConfigError
from saisa_jax.data.sample import Turn
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.inference.image_cache import EncodedImage, ImageCache
from saisa_jax.inference.model import Conversation, VisionLanguageModel
from saisa_jax.models.kv_cache import KVCache
from saisa_jax.models.saisa import Saisa, init_params
from saisa_jax.serving.background import in_background
from saisa_jax.serving.questions import Answers, Ended, Failed, OverdueError, Question, Said, UnavailableError
from saisa_jax.testing.configs import tiny_config

FOLDER = Path(__file__).parents[2] / "integrations" / "vllm"
NEW, COLUMNS, PROMPT = 6, 256, 96
ASKED = [  # turns, pictures
    (["<image>\nwhat color is the shape?"], [0]),
    (["is it red?"], []),
    (["is it a red circle or a blue one?\n<image>\nor is it like\n<image>\n?"], [1, 0]),
    (["<image>\nis it red?", "yes", "<image>\nand this?"], [0, 2]),
]


@pytest.fixture(scope="module")
def vllm() -> Iterator[SimpleNamespace]:
    """The package, which is not installed."""
    sys.path.insert(0, str(FOLDER))
    from saisa_jax_vllm import client, engine, prefixes, runs, store

    yield SimpleNamespace(client=client, engine=engine, prefixes=prefixes, runs=runs, store=store)
    sys.path.remove(str(FOLDER))
    for name in [name for name in sys.modules if name.partition(".")[0] == "saisa_jax_vllm"]:
        del sys.modules[name]


def make_model(name: str = "saisa", seed: int = 1, **fields: Any) -> VisionLanguageModel:
    config = tiny_config(name)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))
    params = init_params(config.model_for("finetune"), jax.random.key(seed))
    params = jax.tree.map(lambda x: x * 1.5 if x.ndim > 1 else x, params)
    return VisionLanguageModel(params, config, load_tokenizer("easy_vqa"), "finetune", {"stage": "finetune"})


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return make_model()


PICTURES = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (32, 32, 3), dtype=np.uint8)) for n in range(4)]


def conversation(texts: list[str], numbers: list[int]) -> Conversation:
    turns = tuple(Turn("assistant" if n % 2 else "user", text) for n, text in enumerate(texts))
    return Conversation(turns, tuple(PICTURES[n] for n in numbers))


def question(model: VisionLanguageModel, texts: list[str], numbers: list[int], **more: Any) -> Question:
    asked = conversation(texts, numbers)
    images = [EncodedImage.of_views(model.loader(picture, "")) for picture in asked.images]
    return Question(model.request(asked.turns, images), NEW, **more)


class Vllm:
    """A stock decoder behind vLLM's routes.

    Attributes:
      params: of the decoder.
      connector: without it, places are what their tokens say.
      failures: so many answers that need runs are errors.
      slow: seconds between tokens.
    """

    def __init__(self, vllm: Any, model: VisionLanguageModel, folder: Path) -> None:
        self.vllm, self.model, self.params, self.folder = vllm, model, model.params, folder
        self.connector, self.failures, self.slow, self.longest = True, 0, 0.0, 128
        self.bodies: list[dict[str, Any]] = []
        self.left = threading.Event()
        method = lambda *args: model.generator.apply(*args, method=Saisa.extend)  # noqa: E731
        self._extend = jax.jit(method)
        self._lock = threading.Lock()

    def app(self) -> Starlette:
        ok = lambda request: Response()  # noqa: E731
        listed = lambda request: JSONResponse({"data": [{"id": "decoder", "max_model_len": self.longest}]})  # noqa: E731
        routes = [Route("/health", ok), Route("/v1/models", listed)]
        return Starlette(routes=[*routes, Route("/v1/completions", self.complete, methods=["POST"])])

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        if body.get("kv_transfer_params") and self.failures:
            self.failures -= 1
            return JSONResponse({"error": {"message": "Internal server error", "code": 500}}, 500)
        tokens, logits = await run_in_threadpool(self.answer, body)
        if not body.get("stream"):
            said = jax.nn.log_softmax(logits)
            top = {f"token_id:{n}": float(said[n]) for n in np.argsort(said)[-body["logprobs"] :]}
            return JSONResponse({"choices": [{"logprobs": {"top_logprobs": [top]}}]})

        async def pieces() -> AsyncIterator[str]:
            try:
                for token in tokens:
                    yield f"data: {json.dumps({'choices': [{'token_ids': [token]}]})}\n\n"
                    await asyncio.sleep(self.slow)
                yield "data: [DONE]\n\n"
            finally:
                self.left.set()

        return StreamingResponse(pieces(), media_type="text/event-stream")

    def answer(self, body: dict[str, Any]) -> tuple[list[int], np.ndarray]:
        """Tokens, and the logits of the first."""
        runs = self.vllm.runs.from_params(body.get("kv_transfer_params")) if self.connector else ()
        c, ids, done = self.model.model_config, body["prompt"], self.vllm.runs.length(runs)
        kv = np.zeros((2, c.num_layers, 1, c.num_kv_heads, COLUMNS, c.head_dim), np.float32)
        for part in self.vllm.runs.parts_from(runs, 0):
            held = load_file(self.vllm.store.path_of(self.folder, part.key))
            at = slice(part.place, part.place + part.last - part.first)
            kv[:, :, 0, :, at] = np.stack([held["k"], held["v"]]).swapaxes(2, 3)
        places, filled = np.arange(COLUMNS, dtype=np.int32)[None], (np.arange(COLUMNS) < done).astype(np.int32)[None]
        cache = KVCache(kv[0], kv[1], places, filled, np.int32(done), None)
        tokens: list[int] = []
        first, new = None, ids[done:]
        with self._lock, self.model.on_mesh():
            while len(tokens) < body["max_tokens"]:
                size = PROMPT if len(new) > 1 or first is None else 1
                pad = lambda x, size=size: np.pad(np.asarray(x, np.int32), (0, size - len(x)))[None]  # noqa: E731
                at = np.arange(done, done + len(new))
                logits, cache = self._extend(self.params, pad(new), pad(at), pad(np.ones(len(new))), cache)
                done, first = done + len(new), np.asarray(logits[0]) if first is None else first
                new = [int(logits[0].argmax())]
                tokens += new
                if new[0] in body["stop_token_ids"]:
                    break
        assert first is not None
        return tokens, first


@pytest.fixture
def there(vllm, model, tmp_path) -> Iterator[SimpleNamespace]:
    """A stand-in for vLLM, and an engine before it that has not been started."""
    stand_in = Vllm(vllm, model, tmp_path)
    with in_background(stand_in.app()) as url:
        store = vllm.store.Store(tmp_path, 10**7)
        own = dataclasses.replace(model, image_cache=ImageCache())
        engine = vllm.engine.VllmEngine(own, vllm.client.Client(url), store, 4, 2, wait=0)
        yield SimpleNamespace(vllm=stand_in, engine=engine, store=store, url=url)
        engine.drain()
        engine.join(20)
        assert not engine.busy and not engine.waiting
        store.close()


class Heard:
    """The events of a question."""

    def __init__(self, engine: Any, question: Question) -> None:
        self.events: list[Any] = []
        self._over = threading.Event()
        self.ticket = engine.submit(question, self._listen)

    def _listen(self, event: Any) -> None:
        self.events.append(event)
        if not isinstance(event, Said):
            self._over.set()

    def end(self) -> Any:
        assert self._over.wait(60), "no end came"
        return self.events[-1]

    def text(self) -> str:
        assert isinstance(self.end(), Ended), self.end()
        return "".join(event.text for event in self.events[:-1])


def test_answers_are_those_of_the_model_and_pictures_are_computed_once(there, vllm, model):
    assert isinstance(there.engine, Answers)
    expected = model.answer([conversation(*asked) for asked in ASKED], NEW)
    assert len(set(expected)) > 2
    with pytest.raises(UnavailableError, match="does not answer"):
        there.engine.submit(question(model, *ASKED[0]), print)
    there.engine.start()
    misses, written = there.engine.model.image_cache.misses, there.store.written
    assert [Heard(there.engine, question(model, *asked)).text() for asked in ASKED] == expected
    computed = there.engine.model.image_cache.misses - misses, there.store.written - written
    assert computed == (3, 1 + 4 + 2), "three pictures; of runs a picture, four, and text and a picture"
    together = [Heard(there.engine, question(model, *asked)) for asked in ASKED * 2]
    assert [heard.text() for heard in together] == expected * 2
    assert there.store.written - written == computed[1]
    usage = [heard.end() for heard in together[:4]]
    assert [ended.cached for ended in usage] == [16, 0, 32, 32] and usage[0].tokens <= NEW
    salts = {body.get("cache_salt") for body in there.vllm.bodies if body.get("stream")}
    assert len(salts) == len(ASKED) and None in salts, "one for each set of pictures, none without"
    counters = {name: value for name, _, value in there.engine.counters}
    assert counters["runs_stored"] == there.store.written and counters["generated_tokens"] > 0


def test_another_model_no_connector_and_too_short_prompts_are_refused(there, vllm, model):
    there.vllm.longest = 100
    with pytest.raises(ConfigError, match=r"takes 100 positions, and the model 128: start it with --max-model-len=128"):
        there.engine.start()
    there.vllm.longest, there.vllm.connector = 128, False
    with pytest.raises(ConfigError, match="agrees with --checkpoint on text, and not on a picture"):
        there.engine.start()
    there.vllm.connector, there.vllm.failures = True, 1
    with pytest.raises(ConfigError, match="does its connector read this store"):
        there.engine.start()
    there.vllm.params = make_model(seed=2).params
    with pytest.raises(ConfigError, match="serves another model than --checkpoint"):
        there.engine.start()
    nobody = vllm.client.Client("http://127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"vLLM at http://127.0.0.1:1 does not answer: .* \(waited for 0 s\)"):
        vllm.engine.VllmEngine(model, nobody, there.store, wait=0).start()
    with pytest.raises(ValueError, match="--vllm=localhost:8001 is not like http://"):
        vllm.client.Client("localhost:8001")


def test_faults_in_the_middle(there, vllm, model):
    expected = model.answer([conversation(*asked) for asked in ASKED], NEW)
    there.engine.start()
    ask = lambda n=0, **more: Heard(there.engine, question(model, *ASKED[n], **more))  # noqa: E731
    assert ask().text() == expected[0]
    written = there.store.written
    for file in there.store.folder.glob("*.safetensors"):  # somebody tidies up
        file.unlink()
    assert ask().text() == expected[0] and there.store.written == written + 2
    there.vllm.failures = 1  # vLLM could not load: computed again, once
    assert ask().text() == expected[0] and there.store.written == written + 4
    there.vllm.failures = 2
    assert isinstance(ask().end(), Failed)
    there.vllm.failures = 0

    there.vllm.slow = 0.5
    assert isinstance(ask(deadline=time.monotonic() + 0.7).end().error, OverdueError)
    there.vllm.left.clear()
    left = ask(ignore_eos=True)
    wait_for(lambda: left.events)
    there.engine.cancel(left.ticket)
    assert there.vllm.left.wait(20), "vLLM goes on for nobody"
    there.vllm.slow = 0.05
    last = ask()
    wait_for(lambda: not there.engine.waiting)
    there.engine.drain()
    with pytest.raises(UnavailableError, match="shutting down"):
        ask()
    assert last.text() == expected[0]


@pytest.mark.slow
def test_the_watch_refuses_questions_while_vllm_is_another(there, vllm, model, monkeypatch):
    monkeypatch.setattr(vllm.engine, "WATCH", 0.05)
    there.engine.start()
    asked, there.engine.client = there.engine.client, vllm.client.Client("http://127.0.0.1:1")
    wait_for(lambda: not there.engine.ready.is_set())
    there.vllm.params, there.engine.client = make_model(seed=2).params, asked
    time.sleep(0.3)
    assert not there.engine.ready.is_set(), "it came back with another model"
    there.vllm.params = model.params
    wait_for(there.engine.ready.is_set)
    assert Heard(there.engine, question(model, *ASKED[1])).text() == model.answer([conversation(*ASKED[1])], NEW)[0]


def wait_for(what: Any) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["naavit", pytest.param("low_rank", marks=pytest.mark.slow)])
def test_runs_hold_what_a_whole_prefill_computes(name, vllm, tmp_path):
    model = make_model(name)
    store = vllm.store.Store(tmp_path, 10**7)
    prefixes = vllm.prefixes.Prefixes(model, store)
    asked = question(model, *ASKED[3]).request
    runs = prefixes.runs(asked)
    prefixes.make(asked, runs)
    _, cache = prefixes.prefill(asked)
    whole = np.zeros((2, 128, cache.k.shape[2], cache.k.shape[4]), np.float32)  # of layer 1
    whole[:, asked.encoded.positions] = np.stack([cache.k, cache.v])[:, 1, 0].swapaxes(1, 2)[
        :, : len(asked.encoded.tokens)
    ]
    whole[:, np.asarray(cache.visual.positions[0])] = np.stack([cache.visual.k, cache.visual.v])[:, 1, 0].swapaxes(1, 2)
    at = 0
    for run in runs:
        held = load_file(vllm.store.path_of(tmp_path, run.key))
        for number, kind in enumerate("kv"):
            np.testing.assert_allclose(held[kind][1], whole[number, at : at + run.places], atol=1e-5)
        at += run.places
    assert at == asked.encoded.image_positions[-1] + 16

    def keys(texts: list[str], numbers: list[int]) -> list[str]:
        return [run.key for run in prefixes.runs(question(model, texts, numbers).request)]

    ours, texts = [run.key for run in runs], ASKED[3][0]  # text, picture, text, picture
    assert keys(texts, [0, 2]) == ours and len(set(ours)) == 4
    same = lambda other: [a == b for a, b in zip(ours, other, strict=True)]  # noqa: E731
    assert same(keys(["<image>\nis it blue?", *texts[1:]], [0, 2])) == [True, True, False, True]
    assert same(keys(texts, [1, 2])) == [True, False, False, True], "text depends on the pictures before it"
    assert same(keys(["<image>\nis it red or blue?", *texts[1:]], [0, 2])) == [True, True, False, False], (
        "another place"
    )
    elsewhere = vllm.prefixes.Prefixes(make_model(name, seed=3), store)
    assert not set(ours) & {run.key for run in elsewhere.runs(asked)}, "another model"
    store.close()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("llava", {}, "model.alignment=llava: its visual tokens depend on the text before them"),
        ("flamingo", {}, "model.alignment=flamingo: it has layers that no stock decoder has"),
        ("saisa", {"visual_layers": (0,)}, r"model.visual_layers leaves out \[1\]"),
        ("saisa", {"frozen_prefix": True}, "model.frozen_prefix: a stock decoder has no such text"),
    ],
)
def test_models_that_a_stock_decoder_does_not_compute(name, fields, message, vllm):
    model = SimpleNamespace(
        model_config=dataclasses.replace(tiny_config(name).model, **fields),
        config=tiny_config(name),
    )
    with pytest.raises(ConfigError, match=message):
        vllm.prefixes.check_served(model)
