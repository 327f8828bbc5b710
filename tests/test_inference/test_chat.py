"""Conversations: what the cache keeps changes no token; and the terminal around them."""

import io
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from saisa_jax import __main__ as main
from saisa_jax.checkpoints import save_model
from saisa_jax.cli.chat import Terminal
from saisa_jax.data.sample import ASSISTANT, USER, DataError, Turn
from saisa_jax.inference.chat import Chat, _Read
from saisa_jax.inference.generate import GREEDY

NEW = 4


def fresh(chat: Chat, question: str, new: int = NEW) -> str:
    """The answer of a conversation that reads everything anew."""
    other = Chat(chat.model, list(chat.turns), list(chat.images), _pending=list(chat._pending))
    return "".join(other.ask(question, new))


def ask(chat: Chat, question: str, new: int = NEW) -> str:
    expected = fresh(chat, question, new)
    pieces = list(chat.ask(question, new))
    assert "".join(pieces) == expected
    return expected


def test_later_turns_read_only_what_is_new(model, pictures):
    chat = Chat(model)
    chat.add_image(pictures[0])
    first = ask(chat, "what color is the shape?")
    assert chat.reused == 0 and chat.turns[-1] == Turn(ASSISTANT, first)
    before = len(chat._read.tokens)
    ask(chat, "is it red?")
    assert chat.reused >= before - NEW  # all of the prompt; of the answer at least what a tokenizer writes alike
    chat.add_image(pictures[1])
    ask(chat, "what color is the shape?")
    assert (chat.reused > before) == (model.model_config.alignment != "llava")
    ask(chat, "is it blue?")
    assert chat.reused > before
    assert [turn.role for turn in chat.turns] == [USER, ASSISTANT] * 4
    assert chat.turns[0].text.startswith("<image>\n") and chat.turns[4].text.startswith("<image>\n")


def test_the_cache_holds_what_a_new_prefill_would(model, pictures):
    chat = Chat(model)
    chat.add_image(pictures[0])
    list(chat.ask("what color is the shape?", NEW))
    request = model.request([*chat.turns, Turn(USER, "is it red?")], chat.images, NEW)
    ours, alone = chat, Chat(model)
    for each in (ours, alone):
        token, _ = each._read_prompt(request, NEW, GREEDY, 0)
        assert token.shape == (1,)
    assert ours.reused > 0 == alone.reused
    columns = [np.flatnonzero(np.asarray(each._read.cache.segment_ids)[0]) for each in (ours, alone)]
    for name in ("k", "v"):
        one, two = (
            np.asarray(getattr(each._read.cache, name))[:, :, :, used]
            for each, used in zip((ours, alone), columns, strict=True)
        )
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_an_answer_that_was_stopped_and_a_turn_that_was_taken_back(model, pictures):
    chat = Chat(model)
    chat.add_image(pictures[2])
    whole = fresh(chat, "what color is the shape?", 8)
    pieces = chat.ask("what color is the shape?", 8)
    seen = next(pieces) + next(pieces)
    pieces.close()
    assert whole.startswith(seen) and chat.turns[-1].text == seen
    ask(chat, "is it red?")
    del chat.turns[-2:]
    ask(chat, "is it green?")
    chat.turns[0] = Turn(USER, "<image>\nis this another question?")
    ask(chat, "is it green?")


def test_pictures_and_words_before_them_that_were_changed(model, pictures):
    chat = Chat(model)
    chat.add_image(pictures[0])
    ask(chat, "is it red? <image> what color is the shape?")
    chat.turns[0] = Turn(USER, "is it blue? <image> what color is the shape?")  # as many tokens
    ask(chat, "is it green?")
    chat.turns.clear()
    chat.images.clear()
    ask(chat, "is it red? what color is the shape?")


def test_frozen_text_before_a_first_picture_is_read_anew():
    """It attended to nothing if a picture came after it, and to all else: what was read otherwise is not kept."""
    model = SimpleNamespace(
        model_config=SimpleNamespace(frozen_prefix=True), generator=SimpleNamespace(caches_images=True)
    )
    chat: Any = SimpleNamespace(model=model)
    old = object.__new__(_Read)
    tokens, positions = [5, 6, 7, 8], [0, 1, 18, 19]
    for images, before, changed, kept in (
        ([("a", 2)], [("a", 2)], 3, 3),
        ([("a", 2)], [("a", 2)], 1, 0),  # a word before the picture
        ([("b", 2)], [("a", 2)], 3, 0),
        ([("a", 2)], [], 3, 0),
        ([], [], 3, 3),
    ):
        old.tokens, old.positions, old.images = list(tokens), list(positions), before
        old.tokens[changed] += 1
        assert Chat._kept(chat, old, tokens, positions, images) == kept


def test_an_answer_that_says_image_is_a_word(model):
    chat = Chat(model)
    list(chat.ask("is it red?", NEW))
    object.__setattr__(chat.model, "text", lambda tokens: "an <image> it is")
    assert list(chat.ask("is it red?", NEW)) == ["an <image> it is"]
    assert chat.turns[-1].text == "an < image > it is"
    object.__delattr__(chat.model, "text")
    ask(chat, "is it red?")


def test_a_question_that_cannot_be_asked_changes_nothing(model, pictures):
    chat = Chat(model)
    list(chat.ask("is there a circle?", NEW))
    turns = list(chat.turns)
    for question, reason in (("", "empty"), ("is it red? " * 80, "max_length"), ("<image> what?", "placeholder")):
        with pytest.raises(DataError, match=reason):
            chat.ask(question, NEW)
    with pytest.raises(DataError, match="there is no image"):
        chat.add_image("nowhere.png")
    assert chat.turns == turns
    ask(chat, "is it red?")


def terminal(chat: Chat, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    out = io.StringIO()
    console = Console(file=out, width=100)
    typed = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(console, "input", read)
    Terminal(chat, console, NEW, GREEDY, 0).run()
    return out.getvalue()


def test_the_terminal(tiny_model, pictures, tmp_path, monkeypatch):
    chat = Chat(tiny_model("saisa"))
    saved = tmp_path / "saved.json"
    lines = [
        f"/image {pictures[0]}",
        "what color is the shape?",
        "/history",
        f"/save {saved}",
        "/image",
        "/image no.png",
    ]
    lines += ["/nothing", "", "is it red? " * 80, "/reset", "/history", "is it red?", "/help", "/exit", "never read"]
    out = terminal(chat, lines, monkeypatch)
    expected = fresh(Chat(chat.model, _pending=chat.model.encode_images(pictures[:1])), "what color is the shape?")
    content = json.loads(saved.read_text())
    assert content["images"] == [pictures[0]]
    assert content["turns"][1] == {"role": "assistant", "text": expected}
    assert out.count(expected) >= 2  # answered, and in the history
    for words in (
        "tokens/s",
        "the first after",
        "which file?",
        "there is no image no.png",
        "no such command",
        "max_length",
    ):
        assert words in out
    assert "/reset" in out and "never read" not in out


def test_the_verb(tiny_model, pictures, tmp_path, monkeypatch, capsys):
    model = tiny_model("saisa")
    save_model(tmp_path / "model", model.params, model.config, model.tokenizer, {"stage": "finetune"})
    monkeypatch.setattr("sys.stdin", io.StringIO("is it red?\n/exit\n"))
    command = ["chat", f"--checkpoint={tmp_path / 'model'}", f"--image={pictures[0]}", "--max_new_tokens=3"]
    assert main.main(command) == 0
    out = capsys.readouterr().out
    assert "programs are compiled" in out and "3 tokens" in out and "; compiling took" in out
    save_model(tmp_path / "mute", model.params, model.config, None, {"stage": "finetune"})
    for wrong, reason in (
        ([f"--checkpoint={tmp_path / 'mute'}"], "imported without a tokenizer"),
        (["--checkpoint=nowhere"], "there is no directory"),
        ([command[1], "--image=nowhere.png"], "there is no image"),
        ([command[1], "--temperature=-1"], "temperature"),
        ([command[1], "--max_new_tokens=0"], "at least 1"),
    ):
        assert main.main(["chat", *wrong]) == 2
        assert reason in capsys.readouterr().err
