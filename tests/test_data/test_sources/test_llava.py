"""LLaVA's JSON and chat messages as samples: what they mean, and what is wrong with one."""

from __future__ import annotations

import base64
import dataclasses
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from saisa_jax.config import SourceConfig
from saisa_jax.data.sample import DataError, Sample
from saisa_jax.data.sources import open_source, warn_of_text_alone
from saisa_jax.data.sources.shards import decode_record, encode_record
from saisa_jax.data.text.conversation import encode
from saisa_jax.data.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("llava")
    for name in ("a", "b", "c"):
        Image.new("RGB", (4, 4)).save(root / f"{name}.png")
    return root


ASK, ANSWER = ("human", "Hi"), ("gpt", "Ho")


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
        ([("human", "<image>What?"), ("gpt", "A.")], {"image": "a.png"}, "<image>\nWhat?", 1),
        ([("human", "<image>"), ("gpt", "A.")], {"image": "a.png"}, "<image>", 1),
        ([("human", "x <image> y"), ("gpt", "A.")], {"image": ["a.png"]}, "x <image> y", 1),
        ([("human", "x <image> y <image>\n<image>"), ("gpt", "A.")], {"image": ["a.png", "b.png", "c.png"]},
         "x <image> y <image>\n<image>", 3),
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


def test_several_images_of_a_turn_stay_where_they_are(folder) -> None:
    text = "Picture 1: <image>\nIts color is red.\nPicture 2: <image>"
    sample = read(folder, llava(("human", text), ("gpt", "green"), image=["a.png", "b.png"]))
    assert names(sample) == ["a.png", "b.png"]
    tokens = encode(sample.turns, "vicuna_v1", load_tokenizer("easy_vqa"), 4, num_images=2, system_prompt="")
    assert tokens.image_positions[0] > 4 and tokens.image_positions[1] > tokens.image_positions[0] + 4


@pytest.mark.parametrize(
    ("form", "key"), [("llava", "image"), ("llava", "images"), ("chat", "image"), ("chat", "images")]
)
@pytest.mark.parametrize("text", ["What?", "<image>\nWhat?"])
@pytest.mark.parametrize(
    "given",
    [
        "a.png", ["a.png"], {"path": "a.png"}, [{"image": "a.png"}], {"url": "a.png"}, {"image_url": {"url": "a.png"}},
        {"bytes": None, "path": "a.png"}, [{"type": "image", "source": {"type": "url", "url": "a.png"}}],
    ],
)  # fmt: skip
def test_pictures_in_every_field_and_form(folder, form, key, text, given) -> None:
    turns = (("human", text), ("gpt", "red")) if form == "llava" else (("user", text), ("assistant", "red"))
    sample = read(folder, (llava if form == "llava" else chat)(*turns, **{key: given}), form)
    assert sample.images == (str(folder / "a.png"),)


@pytest.mark.parametrize(
    "part",
    [
        {"image": "a.png"}, {"path": "a.png"}, {"url": "a.png"}, {"bytes": None, "path": "a.png"},
        {"image": {"path": "a.png"}}, {"text": None, "image": "a.png", "min_pixels": 3},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
        {"type": "image_url", "image_url": "a.png"},
    ],
)  # fmt: skip
def test_every_form_of_an_image_part(folder, part) -> None:
    content = [{"type": "text", "text": "Is it", "index": None}, {"type": "image"} | part]
    assert names(read(folder, chat(("user", content), ("assistant", "A.")), "chat")) == ["a.png"]


def test_an_index_says_which_picture(folder) -> None:
    def show(*indices: int | None) -> dict[str, Any]:
        parts = [{"type": "image", "text": None, "index": index} for index in indices]
        return chat(
            ("user", [*parts, {"type": "text", "text": "Which?"}]), ("assistant", "A."), images=["a.png", "b.png"]
        )

    assert names(read(folder, show(1, 0), "chat")) == ["b.png", "a.png"]
    assert names(read(folder, show(1, 0, 1), "chat")) == ["b.png", "a.png", "b.png"]
    assert names(read(folder, show(None, None), "chat")) == ["a.png", "b.png"]
    for indices, message in (
        ((0, 2), "index=2 is not one of 2 image(s), from 0"),
        ((0, -1), "index=-1 is not one of 2"),
        ((0, None), "some images say their index and others do not"),
        ((1,), "1 <image> in the text and 2 image(s)"),
    ):
        with pytest.raises(DataError, match=re.escape(message)):
            read(folder, show(*indices), "chat")


def test_encoded_pictures(folder) -> None:
    Image.effect_noise((40, 40), 50).save(folder / "noise.png")
    data = (folder / "noise.png").read_bytes()
    text = base64.b64encode(data).decode()
    for given in (f"data:image/png;base64,{text}", text, {"bytes": text}, {"url": f"data:image/png;base64,{text}"}):
        assert read(folder, llava(ASK, ANSWER, image=given)).images == (data,)
    for given, message in (
        ({"bytes": "???"}, "image.bytes is not an image in base64"),
        ("data:image/svg+xml,<svg/>", "image is a data URL that is not in base64"),
        ("data:image/png;base64,@@@@", "image is not an image in base64"),
    ):
        with pytest.raises(DataError, match=re.escape(message)):
            read(folder, llava(ASK, ANSWER, image=given))


def test_absolute_names_with_the_flag(folder) -> None:
    path = str(folder / "a.png")
    (folder / "data.json").write_text(json.dumps([llava(ASK, ANSWER, image=name) for name in (path, f"file://{path}")]))
    source = SourceConfig("llava", path=str(folder / "data.json"), allow_absolute=True)
    assert [sample.images for sample in map(open_source(source).__getitem__, (0, 1))] == [(path,), (path,)]
    with pytest.raises(DataError, match=r"sources.allow_absolute=True takes absolute names"):
        read(folder, llava(ASK, ANSWER, image=path))


@pytest.mark.parametrize(
    ("form", "record", "message"),
    [
        ("llava", {"video": "a.mp4"}, "video is not served"),
        ("llava", {"audios": ["a.wav"]}, "audios is not served"),
        ("chat", {"videos": ["a.mp4"]}, "videos is not served"),
        ("chat", {"tools": [{"name": "f"}]}, "tools is not served"),
        ("llava", {"image_path": "x"}, "image_path holds a picture, and is not read"),
        ("llava", {"img": "x"}, "img holds a picture"),
        ("llava", {"picture": ["x"]}, "picture holds a picture"),
        ("llava", {"where": "train2017/1.JPG"}, "where holds a picture"),
        ("chat", {"what": [{"path": "1.webp"}]}, "what holds a picture"),
        ("llava", {"image": "a.png", "image2": "b.png"}, "image2 holds a picture"),
        ("llava", {"image": "a.png", "images": ["b.png"]}, "'image' and 'images' name different pictures"),
        ("llava", {"image": "https://x.org/a.jpg"}, "is a URL, and nothing is fetched while training"),
        ("chat", {"images": [{"url": "s3://b/a.jpg"}]}, "is a URL, and nothing is fetched"),
        ("llava", {"image": {"path": "a.png", "url": "b.png"}}, "image gives path and url; one of"),
        ("llava", {"image": {"name": "a.png"}}, "image has name; one of bytes"),
        ("llava", {"image": [["a.png"]]}, "image should be text, an object, or a list of those; it has a list"),
    ],
)
def test_what_would_be_left_out_is_refused_by_name(folder, form, record, message) -> None:
    turns = (ASK, ANSWER) if form == "llava" else (("user", "Hi"), ("assistant", "Ho"))
    with pytest.raises(DataError, match=re.escape(message)):
        read(folder, (llava if form == "llava" else chat)(*turns) | {"id": "x"} | record, form)


@pytest.mark.parametrize(
    ("form", "turn", "message"),
    [
        ("llava", {"from": "human", "value": "Hi", "image": "a.png"}, "conversations[0].image holds a picture"),
        ("chat", {"role": "user", "content": "Hi", "images": ["a.png"]}, "messages[0].images holds a picture"),
        ("chat", {"role": "user", "content": "Hi", "tool_calls": [1]}, "messages[0].tool_calls is not served"),
        ("chat", {"role": "user", "content": [{"type": "text", "text": "a", "image": "a.png"}]}, "content.image holds"),
        ("chat", {"role": "user", "content": [{"type": "image", "file": "a.png"}]}, "content.file holds a picture"),
    ],
)  # fmt: skip
def test_what_a_turn_would_lose_is_refused_by_name(folder, form, turn, message) -> None:
    record = (llava(ASK, ANSWER) if form == "llava" else chat(("user", "Hi"), ("assistant", "Ho"))) | {"image": "b.png"}
    record["conversations" if form == "llava" else "messages"][0] = turn
    with pytest.raises(DataError, match=re.escape(message)):
        read(folder, record, form)


def test_what_says_nothing_is_read_over(folder) -> None:
    record = llava(
        ASK, ANSWER, image="a.png", images=["a.png"], image_url="https://x.org/a.jpg", video=None, tools="[]"
    )
    assert names(read(folder, record | {"model": "gpt-4", "source": "coco"})) == ["a.png"]
    assert not read(folder, llava(ASK, ANSWER, image=None, images=[], model="gpt-4", id="a.jpg", url="http://x")).images


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"train": False}, {"training": False}, {"loss_mask": 0}, {"weight": 0.0}]
)
@pytest.mark.parametrize("form", ["llava", "chat"])
def test_turns_that_are_not_learned(folder, demo, form, mark) -> None:
    kept = {name: type(value)(1) for name, value in mark.items()}
    if form == "llava":
        record = llava(("human", "is it red?"), ("gpt", "yes"), ("human", "no"), ("gpt", "blue"))
    else:
        record = chat(("user", "is it red?"), ("assistant", "yes"), ("user", "no"), ("assistant", "blue"))
    turns = record["conversations" if form == "llava" else "messages"]
    turns[1] |= mark
    turns[3] |= kept
    sample = decode_record(encode_record(read(folder, record, form), []))  # shards keep it
    encoded, learned = (encode(turns, "vicuna_v1", demo, 4, system_prompt="") for turns in (
        sample.turns, [dataclasses.replace(turn, loss=True) for turn in sample.turns]))  # fmt: skip
    assert encoded.tokens.tolist() == learned.tokens.tolist()
    assert demo.decode(encoded.targets[encoded.loss_weights > 0]) == "blue</s>"
    assert demo.decode(learned.targets[learned.loss_weights > 0]) == "yes</s> blue</s>"
    turns[3] |= mark
    with pytest.raises(DataError, match=r"no token is supervised"):
        encode(read(folder, record, form).turns, "vicuna_v1", demo, 4)
    for wrong in (0.5, [0, 1], "no"):
        turns[3] |= dict.fromkeys(mark, wrong)
        with pytest.raises(DataError, match=r"\[3\].* should be true or false, 1 or 0"):
            read(folder, record, form)


@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize("form", ["llava", "chat"])
def test_a_system_prompt_beside_the_turns(folder, form, key) -> None:
    record = llava(ASK, ANSWER) if form == "llava" else chat(("user", "Hi"), ("assistant", "Ho"))
    assert read(folder, record | {key: "Be brief."}, form).system == "Be brief."
    for nothing in ("", None):
        assert read(folder, record | {key: nothing}, form).system is None
    both = {"system": "Be brief.", "system_prompt": "Be kind."}
    with pytest.raises(DataError, match=r"'system' and 'system_prompt' say different things"):
        read(folder, record | both, form)
    turns = record["conversations" if form == "llava" else "messages"]
    turns.insert(0, {"from": "system", "value": "x", "role": "system", "content": "x"})
    with pytest.raises(DataError, match=r"a system turn comes first, and there is one at most"):
        read(folder, record | {key: "Be brief."}, form)


def test_a_source_of_text_alone_is_told_of(folder, caplog) -> None:
    for image, told in ((None, True), ("a.png", False)):
        (folder / "data.json").write_text(json.dumps([llava(ASK, ANSWER)] * 3 + [llava(ASK, ANSWER, image=image)]))
        config = SourceConfig("llava", path=str(folder / "data.json"))
        caplog.clear()
        with caplog.at_level("WARNING", "absl"):
            warn_of_text_alone([open_source(config)], [config])
        assert ("none of 4 samples that were looked at has a picture" in caplog.text) == told


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
    assert said(sample)[0] == ("user", "Compare\n<image>\nwith\n<image>")
    assert said(sample)[2] == ("user", "And <image> this?")
    assert names(sample) == ["a.png", "b.png", "c.png"]


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


@pytest.mark.parametrize(
    ("form", "record", "message"),
    [
        ("llava", [1], "sample 'data.json:1': a sample is an object {...}, this one is a list"),
        ("llava", None, "a sample is an object {...}, this one is missing"),
        ("llava", {"id": "x"}, "sample 'x': 'conversations' should be a list of turns, and is missing"),
        ("llava", llava(id="x"), "sample 'x': 'conversations' should be a list of turns, and is an empty list"),
        ("llava", chat(("user", "Hi")), "is missing; is it sources.format=chat?"),
        ("chat", llava(ASK), "is missing; is it sources.format=llava?"),
        ("llava", llava(("humna", "Hi")), "conversations[0].from='humna' is an unknown role, not one of "),
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
        ("llava", llava(ASK, ANSWER, image=5), "image should be text, an object, or a list of those; it has a number"),
        ("llava", llava(ASK, ANSWER, image="../a.png"), "image '../a.png' is not a path within sources.images"),
        ("llava", llava(ASK, ANSWER, image=""), "image '' is not a path within sources.images"),
        ("chat", chat(("user", [{"type": "audio"}])), "a part of type 'audio'; known: text, image"),
        ("chat", chat(("user", ["Hi"])), "messages[0].content has a part of type None"),
        ("chat", chat(("user", [{"type": "image"}])), "an image that neither it nor 'images' names"),
        ("chat", chat(("user", [{"type": "text", "text": "<image>"}])), "has <image> within a text"),
        ("chat", chat(("user", "Hi"), ("tool", "x")), "messages[1].role='tool' is an unknown role, not one of "),
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
