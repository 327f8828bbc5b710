"""Continuous batching: whoever else is answered, an answer is the one that its question gets alone."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from saisa_jax.config import ConfigError
from saisa_jax.data.sample import ASSISTANT, USER, Turn
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.inference.chat import Chat
from saisa_jax.inference.generate import GREEDY, Sampling
from saisa_jax.inference.image_cache import ImageCache
from saisa_jax.inference.model import VisionLanguageModel
from saisa_jax.models.saisa import init_params
from saisa_jax.serving.engine import Engine
from saisa_jax.serving.questions import (
    LENGTH,
    STOP,
    Ended,
    Event,
    Failed,
    OverdueError,
    Question,
    Said,
    UnavailableError,
)
from saisa_jax.serving.rows import Rows, make_levels
from saisa_jax.testing.configs import tiny_config
from saisa_jax.testing.gates import with_open_gates
from saisa_jax.testing.programs import compilations

LONG = "is there a red circle or a blue one or a green one in the image and what color is it?"
ASKED = [  # (text, pictures, new tokens, sampling, seed)
    ("what color is the shape?", [0], 12, GREEDY, 0),
    ("is it red?", [], 5, Sampling(1.0, 0.9), 3),
    ("<image> is it like <image>?", [1, 0], 20, Sampling(0.7, 1.0), 4),
    (LONG, [2], 9, GREEDY, 0),
    ("what color is the shape?", [0], 12, Sampling(1.0, 0.9), 5),
    ("what color is the shape?", [0], 16, Sampling(1.0, 0.9), 6),
    ("no", [3], 1, GREEDY, 0),
    (LONG, [], 14, Sampling(2.0, 1.0), 7),
]


def question(model: Any, pictures: Any, asked: Any, **more: Any) -> Question:
    text, images, new, sampling, seed = asked
    encoded = model.encode_images([pictures[n] for n in images])
    unseen = [dataclasses.replace(image, kv=None) for image in encoded]
    return Question(model.request((Turn(USER, text),), unseen, new), new, sampling, seed, **more)


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Said))


def by_chat(model: Any, pictures: Any, asked: Any) -> str:
    text, images, new, sampling, seed = asked
    chat = Chat(model)
    for n in images:
        chat.add_image(pictures[n])
    return "".join(chat.ask(text, new, sampling, seed))


def answers(engine: Engine, questions: list[Question]) -> Iterator[list[Event]]:
    """The events of several questions that are asked at once."""
    heard: list[queue.SimpleQueue[Event]] = [queue.SimpleQueue() for _ in questions]
    for question, listen in zip(questions, heard, strict=True):
        engine.submit(question, listen.put)
    for each in heard:
        events: list[Event] = []
        while not events or isinstance(events[-1], Said):
            events.append(each.get())
        yield events


@pytest.fixture(scope="module")
def expected(model, pictures) -> list[str]:
    return [by_chat(model, pictures, asked) for asked in ASKED]


def settled(engine: Engine) -> bool:
    """Waits until no row is in use."""
    end = time.monotonic() + 20
    while (engine.busy or engine.waiting) and time.monotonic() < end:
        time.sleep(0.01)
    return not engine.busy and not engine.waiting


def test_an_answer_is_the_same_alone_and_in_company(engine, model, pictures, expected):
    assert len(set(expected)) > 5  # else equal answers would prove nothing
    questions = [question(model, pictures, asked) for asked in ASKED]
    with compilations() as compiled:
        alone = [text_of(next(answers(engine, [each]))) for each in questions]
        for order in (range(8), (7, 2, 5, 0, 3, 6, 1, 4)):
            together = answers(engine, [questions[n] for n in order])
            assert [text_of(events) for events in together] == [expected[n] for n in order]
    assert alone == expected
    assert not compiled
    assert settled(engine)


def test_conversations_of_several_turns(engine, model, pictures):
    turns = (Turn(USER, "<image>\nis it red?"), Turn(ASSISTANT, "no"), Turn(USER, "what color is it?"))
    chat = Chat(model, list(turns[:2]), model.encode_images(pictures[:1]))
    expected = "".join(chat.ask(turns[2].text, 6))
    request = model.request(turns, model.encode_images(pictures[:1]), 6)
    assert text_of(next(answers(engine, [Question(request, 6)]))) == expected


def test_a_kept_picture_costs_text_alone(engine, model, pictures, monkeypatch):
    monkeypatch.setitem(model.__dict__, "image_cache", ImageCache())
    encoded = []
    encode = model.generator.encode
    monkeypatch.setattr(model.generator, "encode", lambda *args: encoded.append(len(args[1])) or encode(*args))
    images = [dataclasses.replace(image, kv=None) for image in model.encode_images(pictures[:1])]
    ask = Question(model.request((Turn(USER, "is it red?"),), images, 4), 4)
    model.image_cache.__init__()  # forgets it
    ends = [events[-1] for events in answers(engine, [ask, ask, ask])]
    assert encoded == [1, 1]  # one by this test, one by the engine
    places = model.model_config.vision.num_patches
    assert [end.cached for end in ends] == [0, places, places]


def test_ends(engine, model, pictures, expected):
    base = question(model, pictures, ASKED[2])
    *_, end = next(answers(engine, [base]))
    assert end == Ended(LENGTH, 20, 2 * model.model_config.vision.num_patches)
    word = expected[2][len(expected[2]) // 2 :][:3]
    stopped = next(answers(engine, [dataclasses.replace(base, stop=("never", word))]))
    assert text_of(stopped) == expected[2][: expected[2].index(word)].rstrip()
    assert stopped[-1].reason == STOP and stopped[-1].tokens < 20


def test_an_end_token_ends_an_answer(engine, model, pictures, expected, monkeypatch):
    tokens = model.tokenizer.encode(expected[3], add_special_tokens=False)
    monkeypatch.setattr(model.generator, "eos_ids", (tokens[-1],))
    events = next(answers(engine, [question(model, pictures, ASKED[3])]))
    assert events[-1].reason == STOP and events[-1].tokens < 9
    endless = next(answers(engine, [question(model, pictures, ASKED[3], ignore_eos=True)]))
    assert endless[-1].reason == LENGTH and text_of(endless) == expected[3]
    assert text_of(events) != expected[3] and expected[3].startswith(text_of(events))


def test_decoding_waits_for_one_piece_of_work_at_most(engine, model, pictures, monkeypatch):
    """While a row decodes, others with new pictures and long prompts come in."""
    rows, work = engine.rows, []
    for owner, name in ((rows, "read"), (rows, "step"), (model.generator, "encode")):
        act = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, act=act, name=name: work.append(name) or act(*args))
    first = question(model, pictures, ("is it red?", [], 60, Sampling(2.0), 1))
    others = [question(model, pictures, (LONG, [n], 2, GREEDY, 0)) for n in range(4)]
    monkeypatch.setitem(model.__dict__, "image_cache", ImageCache(0))  # nothing is kept
    work.clear()
    list(answers(engine, [first, *others]))
    decoding = "".join(name[0] for name in work[work.index("step") :])  # read, step, encode
    assert decoding.count("e") >= 2 and decoding.count("r") >= 4
    assert max(map(len, decoding[: decoding.rindex("e")].split("s"))) == 1


class Listener:
    """Remembers events; may be waited for."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.heard: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.put(event)

    def next(self) -> Event:
        self.heard.append(self.events.get(timeout=20))
        return self.heard[-1]


def test_a_cancelled_question_frees_its_row_and_says_no_more(engine, model, pictures, expected):
    listener = Listener()
    long = ("is it red?", [], 80, Sampling(3.0), 1)
    ticket = engine.submit(question(model, pictures, long), listener)
    others = answers(engine, [question(model, pictures, asked) for asked in ASKED])
    listener.next()
    engine.cancel(ticket)
    assert [text_of(events) for events in others] == expected
    assert settled(engine) and not any(isinstance(event, Ended | Failed) for event in listener.heard)


def test_overdue_questions_fail_wherever_they_are(engine, model, pictures):
    long = ("is it red?", [], 80, Sampling(3.0), 1)
    late = time.monotonic() + 0.05
    questions = [question(model, pictures, long, deadline=late) for _ in range(6)]
    ends = [events[-1] for events in answers(engine, questions)]
    assert all(isinstance(end, Failed) and isinstance(end.error, OverdueError) for end in ends)
    assert settled(engine)


def test_a_picture_that_cannot_be_encoded_harms_nobody_else(engine, model, pictures, expected, monkeypatch):
    bad = np.asarray(question(model, pictures, ASKED[6]).request.images[0].pixels)
    encode = type(model).encode_images

    def fails(self: Any, images: Any) -> Any:
        if np.array_equal(images[0].pixels, bad):
            raise MemoryError("no room for a picture")
        return encode(self, images)

    questions = [question(model, pictures, asked) for asked in ASKED]
    monkeypatch.setattr(type(model), "encode_images", fails)
    told = list(answers(engine, questions))
    assert isinstance(told[6][-1], Failed) and "no room" in str(told[6][-1].error)
    assert [text_of(events) for n, events in enumerate(told) if n != 6] == [
        text for n, text in enumerate(expected) if n != 6
    ]


def test_a_failed_step_loses_its_rows_and_the_next_ones_are_answered(engine, model, pictures, expected, monkeypatch):
    def fails(*args: Any) -> Any:
        monkeypatch.undo()
        raise RuntimeError("out of memory")

    questions = [question(model, pictures, asked) for asked in ASKED[:6]]
    monkeypatch.setattr(engine.rows, "step", fails)
    told = list(answers(engine, questions))
    failed = [isinstance(events[-1], Failed) for events in told]
    assert 1 <= sum(failed) <= 3
    good = [(text_of(events), text) for events, text, bad in zip(told, expected, failed, strict=False) if not bad]
    assert all(said == text for said, text in good)
    assert settled(engine)


def test_draining_answers_the_rows_and_refuses_the_rest(engine, model, pictures, expected):
    own = Engine(model, rows=1, max_images=2, pieces=(8, 16))
    own.rows = engine.rows  # compiled already; the other engine rests meanwhile
    with pytest.raises(UnavailableError, match="compiling"):
        own.submit(question(model, pictures, ASKED[0]), print)
    own.start()
    assert own.ready.wait(60)
    many = [Listener() for _ in range(6)]
    for listener in many:
        own.submit(question(model, pictures, ASKED[2]), listener)
    many[0].next()
    threading.Thread(target=own.drain).start()
    for listener in many:
        while not listener.heard or isinstance(listener.heard[-1], Said):
            listener.next()
    own.join(20)
    assert not own.alive
    assert [text_of(listener.heard) for listener in many[:3]] == [expected[2]] * 3
    assert all("shutting down" in str(listener.heard[-1].error) for listener in many[3:])
    with pytest.raises(UnavailableError, match="shutting down"):
        own.submit(question(model, pictures, ASKED[0]), print)


def test_levels():
    assert make_levels(2048, 3, 128) == [(256, 1), (1024, 2), (2048, 3)]
    assert make_levels(100, 2, 128) == [(128, 2)]


def test_models_that_are_not_served(model):
    with pytest.raises(ConfigError, match="alignment=llava is not served"):
        Rows(dataclasses.replace(model, config=tiny_config("llava")), 1, 1)
    with pytest.raises(ConfigError, match="--rows=0"):
        Rows(model, 0, 1)


@pytest.fixture(scope="module")
def crossed(pictures) -> VisionLanguageModel:
    """Cross layers that read the text as well, whose keys stand in the rows' buffers behind the decoder's."""
    config = tiny_config("casa")
    params = with_open_gates(init_params(config.model_for("finetune"), jax.random.key(1)))
    params = jax.tree.map(lambda x: x * 1.5 if x.ndim > 1 else x, params)
    return VisionLanguageModel(params, config, load_tokenizer("easy_vqa"), "finetune", {"stage": "finetune"})


def test_cross_layers_are_served_as_they_answer_alone(crossed, pictures):
    asked = [ASKED[n] for n in (0, 2, 4)]
    expected = [by_chat(crossed, pictures, each) for each in asked]
    assert len(set(expected)) > 1
    engine = Engine(crossed, rows=2, max_images=2, pieces=(16,))
    engine.start()
    assert engine.ready.wait(300)
    together = answers(engine, [question(crossed, pictures, each) for each in asked])
    assert [text_of(events) for events in together] == expected
    engine.drain()
    engine.join(60)
