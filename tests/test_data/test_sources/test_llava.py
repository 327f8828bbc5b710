"""LLaVA's JSON and chat messages as samples: what they mean, and what is wrong with one."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from saisa_jax.config import SourceConfig
from saisa_jax.data.sample import DataError, Sample
from saisa_jax.data.sources import open_source
from saisa_jax.data.text.conversation import encode
from saisa_jax.data.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("llava")
    for name in ("a", "b", "c"):
        Image.new("RGB", (4, 4)).save(root / f"{name}.png")
    return root


def read(folder: Path, record: Any, form: str = "llava", name: str = "data.json") -> Sample:
    (folder / name).write_text(json.dumps([{"id": "first", "x": 1}, record]))
    return open_source(SourceConfig(form, path=str(folder / name)))[1]


def llava(*turns: tuple[str, Any], **fields: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **fields}


def chat(*messages: tuple[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages], **fields}


def said(sample: Sample) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in sample.turns]


def names(sample: Sample) -> list[str]:
    return [Path(str(image)).name for image in sample.images]


# --- What they mean --------------------------------------------------------------------------------------------------


def test_a_conversation_about_an_image(folder) -> None:
    record = llava(("human", "<image>\nWhat?"), ("gpt", "A cat."), ("human", "Sure?"), ("gpt", "Yes."), image="a.png")
    sample = read(folder, record | {"id": 7})
    assert sample.id == "7"
    assert said(sample) == [
        ("user", "<image>\nWhat?"), ("assistant", "A cat."), ("user", "Sure?"), ("assistant", "Yes."),
    ]  # fmt: skip
    assert sample.images == (str(folder / "a.png"),)
    assert sample.system is None and not sample.independent_turns


@pytest.mark.parametrize(
    ("turns", "fields", "first", "count"),
    [
        ([("human", "Hi 🙂"), ("gpt", "日本")], {}, "Hi 🙂", 0),  # text alone
        ([("human", "Hi"), ("gpt", "Ho")], {"image": None}, "Hi", 0),
        ([("human", "Hi"), ("gpt", "Ho")], {"image": []}, "Hi", 0),
        ([("user", "What?"), ("assistant", "A.")], {"image": "a.png"}, "What?", 1),  # the encoder puts it in front
        ([("human", "What?\n<image>"), ("gpt", "A.")], {"image": "a.png"}, "<image>\nWhat?", 1),
        ([("human", "What? <image> \n"), ("gpt", "A.")], {"image": "a.png"}, "<image>\nWhat?", 1),
        ([("human", "<image>"), ("gpt", "A.")], {"image": "a.png"}, "<image>", 1),
        ([("human", "x <image> y"), ("gpt", "A.")], {"image": ["a.png"]}, "x <image> y", 1),
        ([("human", "x <image> y <image>\n<image>"), ("gpt", "A.")], {"image": ["a.png", "b.png", "c.png"]},
         "<image>\n<image>\nx <image> y", 3),
    ],
)  # fmt: skip
def test_where_images_stand(folder, turns, fields, first, count) -> None:
    sample = read(folder, llava(*turns, **fields))
    assert sample.turns[0].text == first
    assert len(sample.images) == count
    assert sample.id == "data.json:1"
    encoded = encode(sample.turns, "vicuna_v1", load_tokenizer("easy_vqa"), 4, num_images=count)
    assert len(encoded.image_positions) == count


def test_an_image_of_a_later_turn(folder) -> None:
    record = llava(("human", "Hi"), ("gpt", "Ho"), ("human", "And this?\n<image>"), ("gpt", "A cat."), image="b.png")
    assert said(read(folder, record))[::2] == [("user", "Hi"), ("user", "<image>\nAnd this?")]


def test_system_turns_and_a_beginning_in_the_middle(folder) -> None:
    sample = read(folder, llava(("system", "Be brief."), ("human", "Hi"), ("gpt", "Ho")))
    assert sample.system == "Be brief."
    assert said(sample) == [("user", "Hi"), ("assistant", "Ho")]
    sample = read(folder, llava(("gpt", "... and so on."), ("human", "Hi"), ("gpt", "Ho")))
    assert said(sample) == [("user", "Hi"), ("assistant", "Ho")]


def test_chat_messages(folder) -> None:
    record = chat(
        ("system", "Be brief."),
        ("user", [{"type": "text", "text": "Compare"}, {"type": "image", "image": "a.png"},
                  {"type": "text", "text": "with"}, {"type": "image"}]),
        ("assistant", [{"type": "text", "text": "Alike."}]),
        ("user", "And <image> this?"),
        ("assistant", "Not."),
        images=["b.png", "c.png"],
    )  # fmt: skip
    sample = read(folder, record, "chat")
    assert sample.system == "Be brief."
    assert said(sample)[0] == ("user", "<image>\nCompare\n<image>\nwith")
    assert said(sample)[2] == ("user", "And <image> this?")
    # The image that ended the turn is in front of the turn's other one now, and so is its name.
    assert names(sample) == ["b.png", "a.png", "c.png"]


def test_jsonl_and_pickle(folder) -> None:
    lines = [llava(("human", f"{i}?"), ("gpt", "é"), image="a.png") for i in range(5)]
    (folder / "data.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), "utf-8")
    source = open_source(SourceConfig("llava", path=str(folder / "data.jsonl"), images=str(folder)))
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i] for i in range(5)] == [source[i] for i in range(5)]
    assert copy[-1].turns[0].text == "4?"
    with pytest.raises(IndexError):
        copy[5]


# --- What is wrong with one ------------------------------------------------------------------------------------------

ASK, ANSWER = ("human", "Hi"), ("gpt", "Ho")


@pytest.mark.parametrize(
    ("form", "record", "message"),
    [
        ("llava", [1], "sample 'data.json:1': a sample is an object {...}, this one is a list"),
        ("llava", None, "a sample is an object {...}, this one is missing"),
        ("llava", {"id": "x"}, "sample 'x': 'conversations' should be a list of turns, and is missing"),
        ("llava", llava(id="x"), "sample 'x': 'conversations' should be a list of turns, and is an empty list"),
        ("llava", chat(("user", "Hi")), "is missing; is it sources.format=chat?"),
        ("chat", llava(ASK), "is missing; is it sources.format=llava?"),
        ("llava", llava(("humna", "Hi")), "conversations[0].from='humna' is an unknown role (did you mean 'human'?)"),
        ("llava", llava((7, "Hi")), "conversations[0].from='7' is an unknown role"),
        ("llava", llava(ASK, ANSWER, ANSWER), "two turns of the assistant in a row"),
        ("llava", llava(ASK, ASK), "two turns of the user in a row"),
        ("llava", llava(ASK, ANSWER, ("system", "x")), "a system turn comes first"),
        ("llava", llava(("human", 3), ANSWER), "conversations[0].value should be text, and is a number"),
        ("llava", llava(("human", None), ANSWER), "conversations[0].value should be text, and is missing"),
        ("llava", llava(("human", "a\ud800b"), ANSWER), "conversations[0].value has half a character"),
        ("llava", llava(("human", "<image>"), ("gpt", " "), image="a.png"), "no text: nothing is said in it"),
        ("llava", llava(("human", "<image> x"), ANSWER), "1 <image> in the text and 0 image(s)"),
        ("llava", llava(("human", "<image> x"), ANSWER, image=["a.png", "b.png"]), "1 <image> in the text and 2"),
        ("llava", llava(ASK, ANSWER, image=5), "image should be text, and is a number"),
        ("llava", llava(ASK, ANSWER, image={"path": "a.png"}), "image should be text, and is an object"),
        ("llava", llava(ASK, ANSWER, image="../a.png"), "image '../a.png' is not a path within sources.images"),
        ("llava", llava(ASK, ANSWER, image=""), "image '' is not a path within sources.images"),
        ("chat", chat(("user", [{"type": "audio"}])), "a part of type 'audio'; known: text, image"),
        ("chat", chat(("user", ["Hi"])), "messages[0].content has a part of type None"),
        ("chat", chat(("user", [{"type": "image"}])), "an image that neither it nor 'images' names"),
        ("chat", chat(("user", [{"type": "text", "text": "<image>"}])), "has <image> within a text"),
        ("chat", chat(("user", "Hi"), images="a.png"), "images should be a list of names, not text"),
        ("chat", chat(("user", "Hi"), ("tool", "x")), "messages[1].role='tool' is an unknown role"),
    ],
)  # fmt: skip
def test_a_bad_sample_is_named(folder, form, record, message) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read(folder, record, form)
    assert caught.value.sample_id in ("x", "data.json:1")


def test_a_source_that_cannot_be_opened(folder) -> None:
    (folder / "empty.json").write_text("[]")
    with pytest.raises(DataError, match=r"source llava:.*empty.json holds no samples"):
        open_source(SourceConfig("llava", path=str(folder / "empty.json")))
    with pytest.raises(DataError, match=r"sources.images='.*nowhere' is neither a folder"):
        open_source(SourceConfig("llava", path=str(folder / "empty.json"), images=str(folder / "nowhere")))
