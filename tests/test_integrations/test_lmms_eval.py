"""The adapter for lmms-eval, with a stand-in for lmms-eval: what is asked, in which batches, and what comes back."""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import saisa_jax
from saisa_jax.data.sample import DataError, Turn
from saisa_jax.inference.generate import Sampling
from saisa_jax.inference.model import Conversation

FOLDER = Path(__file__).parents[2] / "integrations" / "lmms_eval"
RED, BLUE = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")


class Lmms:
    """As lmms_eval.api.model.lmms, without torch."""

    is_simple = True

    def __init__(self) -> None:
        self.cache_hook = SimpleNamespace(add_partial=lambda *given: self.cached.append(given))
        self.cached: list[Any] = []
        self.task_dict: dict[str, Any] = {}


@dataclass(frozen=True)
class ModelManifest:
    """As lmms_eval.models.registry_v2.ModelManifest."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass
class Model:
    """Answers with the question; notes what it was asked."""

    asked: list[tuple[list[Conversation], int, Sampling, str]] = field(default_factory=list)

    def answer(self, asked, max_new_tokens, sampling, seed, on_error):
        self.asked.append((list(asked), max_new_tokens, sampling, on_error))
        wrong = [DataError("too long", one.name) if "long" in one.turns[-1].text else None for one in asked]
        if any(wrong) and on_error == "raise":
            raise next(error for error in wrong if error)
        return [
            error or f"{one.turns[-1].text}.\n\nand Question: more" for one, error in zip(asked, wrong, strict=True)
        ]


@pytest.fixture
def model(monkeypatch) -> Model:
    found = Model()
    monkeypatch.setattr(saisa_jax, "load", lambda checkpoint, dtype=None, quantize=None: found, raising=False)
    return found


@pytest.fixture
def adapter(monkeypatch) -> Iterator[ModuleType]:
    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.models", "lmms_eval.models.registry_v2")
    fakes = {name: ModuleType(name) for name in names}
    vars(fakes["lmms_eval.api.model"])["lmms"] = Lmms
    vars(fakes["lmms_eval.models.registry_v2"])["ModelManifest"] = ModelManifest
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("saisa_jax_lmms.model")
    for name in [name for name in sys.modules if name.partition(".")[0] == "saisa_jax_lmms"]:
        del sys.modules[name]


GREEDY = {"max_new_tokens": 16, "temperature": 0, "until": ["\n\n"], "do_sample": False}


def chat(documents: dict[Any, Any], settings: dict[str, Any] | None = None) -> list[Any]:
    """A request for each document, which is its own messages."""
    settings = [settings or GREEDY] * len(documents)
    return [SimpleNamespace(args=("text", list, settings[0], key, "quiz", "test")) for key in documents]


def user(*parts: Any) -> list[dict[str, Any]]:
    kind = lambda part: {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "url": part}  # noqa: E731
    return [{"role": "user", "content": [kind(part) for part in parts]}]


def test_what_the_distribution_announces(adapter, model) -> None:
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["saisa_jax"].partition(":")
    manifest = getattr(importlib.import_module(module), name)
    assert manifest.model_id == "saisa_jax"
    for path, simple in ((manifest.simple_class_path, True), (manifest.chat_class_path, False)):
        where, _, kind = path.rpartition(".")
        found = getattr(importlib.import_module(where), kind)
        assert issubclass(found, Lmms) and found.is_simple is simple


def test_messages_become_conversations(adapter) -> None:
    asked = adapter.from_messages(user(RED, BLUE, "which?"), "quiz/1")
    assert asked == Conversation((Turn("user", "which?"),), (RED, BLUE), None, "quiz/1")
    asked = adapter.from_messages(user("first", RED, "then", BLUE, "which?"), "quiz/1")
    assert asked.turns[0].text == "first\n<image>\nthen\n<image>\nwhich?" and asked.images == (RED, BLUE)
    spoken = [{"role": "system", "content": "be brief"}, *user("what?"), {"role": "assistant", "content": "red"}]
    asked = adapter.from_messages([*spoken, *user(RED, "and this?")], "quiz/1")
    assert asked.system == "be brief" and [turn.role for turn in asked.turns] == ["user", "assistant", "user"]
    assert asked.turns[2].text == "<image>\nand this?"
    with pytest.raises(adapter.UnservedError, match=r"quiz/1 shows a video: text and images are served"):
        adapter.from_messages([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], "quiz/1")


def test_simple_and_chat_ask_the_same(adapter, model) -> None:
    documents = {"a": {"image": RED, "text": "is it red?"}, "b": {"image": BLUE, "text": "it is what?"}}
    simple, both = adapter.SaisaJaxSimple("DIR", 2), adapter.SaisaJaxChat("DIR", "2")
    simple.task_dict = both.task_dict = {"quiz": {"test": documents}}
    visual, messages = lambda doc: [doc["image"]], lambda doc: user(doc["image"], doc["text"])
    one = [SimpleNamespace(args=(d["text"], GREEDY, visual, key, "quiz", "test")) for key, d in documents.items()]
    two = [SimpleNamespace(args=(d["text"], messages, GREEDY, key, "quiz", "test")) for key, d in documents.items()]
    assert simple.generate_until(one) == both.generate_until(two)
    assert model.asked[0] == model.asked[1] and model.asked[0][1:] == (16, Sampling(0.0, 1.0), "raise")
    assert [asked.name for asked in model.asked[0][0]] == ["quiz/a", "quiz/b"]
    assert len(simple.cached) == 2 and simple.cached[0][:2] == ("generate_until", ("is it red?", GREEDY))


def test_batches_are_of_one_setting_and_full(adapter, model) -> None:
    documents = {number: user("x" * (9 - number)) for number in range(7)}
    ours = adapter.SaisaJaxChat("DIR", batch_size=4, max_new_tokens="10")
    ours.task_dict = {"quiz": {"test": documents}}
    requests = chat(documents)
    warm = {"max_new_tokens": 5, "temperature": 0.5, "top_p": 0.9, "until": ["."], "seed": 3}
    requests[2] = SimpleNamespace(args=("text", list, warm, 2, "quiz", "test"))
    answers = ours.generate_until(requests)
    assert answers == ["x" * (9 - n) + ("" if n == 2 else ".\n\nand Question: more") for n in range(7)]
    seen = [([len(one.turns[0].text) for one in asked], tokens, how) for asked, tokens, how, _ in model.asked]
    assert sorted(seen, key=lambda one: -len(one[0])) == [
        ([3, 4, 5, 6], 10, Sampling(0.0, 1.0)),
        ([8, 9, 9, 9], 10, Sampling(0.0, 1.0)),  # filled up, so that it compiles nothing
        ([7], 5, Sampling(0.5, 0.9)),
    ]


def test_what_is_not_served(adapter, model, caplog) -> None:
    documents = {0: user("too long"), 1: user("short")}
    for wrong, message in [
        ({}, "needs a checkpoint"),
        ({"checkpoint": "DIR", "temprature": 1}, "has no temprature"),
        ({"checkpoint": "DIR", "on_error": "drop"}, "on_error='drop' is neither raise nor empty"),
        ({"checkpoint": "DIR", "batch_size": "auto"}, "--batch_size=auto is not a number"),
    ]:
        with pytest.raises(adapter.UnservedError, match=message):
            adapter.SaisaJaxChat(**wrong)
    strict, lenient = adapter.SaisaJaxChat("DIR", 2), adapter.SaisaJaxChat("DIR", 2, on_error="empty", device="cuda:0")
    strict.task_dict = lenient.task_dict = {"quiz": {"test": documents}}
    with pytest.raises(DataError, match=r"sample 'quiz/0': too long"):
        strict.generate_until(chat(documents))
    with caplog.at_level("WARNING", "absl"):
        answers = lenient.generate_until(chat(documents, GREEDY | {"image_aspect_ratio": "pad", "until": "Question:"}))
    assert answers == ["", "short.\n\nand "]
    assert "quiz/0" in caplog.text and "image_aspect_ratio='pad' is not served" in caplog.text
    with pytest.raises(adapter.UnservedError, match=r"num_beams=5 is not served"):
        strict.generate_until(chat({1: documents[1]}, GREEDY | {"num_beams": 5}))
    for method in (strict.loglikelihood, strict.generate_until_multi_round):
        with pytest.raises(adapter.UnservedError, match="output_type generate_until"):
            method([])
