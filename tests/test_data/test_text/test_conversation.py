"""Prompts, labels and positions of conversations."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from saisa_jax.data.sample import DataError, Turn
from saisa_jax.data.text.conversation import check_length, encode, encode_prompt, end_token_id, truncate
from saisa_jax.data.text.templates import TEMPLATES, VICUNA_SYSTEM, find_template
from saisa_jax.data.text.tokenizer import DEMO_TEMPLATES

P = 4
QUESTION, ANSWER = Turn("user", "what shape is present?"), Turn("assistant", "circle")
TWO_ROUNDS = (QUESTION, ANSWER, Turn("user", "is it red?"), Turn("assistant", "no, it is blue."))

# What the official prompt of each template is for TWO_ROUNDS without an image and with the system prompt "Be brief."
WHOLE_TEXT = {
    "plain": "<s>\ncircle</s>\nno, it is blue.</s>",
    "vicuna_v1": "<s>Be brief. USER: what shape is present? ASSISTANT: circle</s>"
    "USER: is it red? ASSISTANT: no, it is blue.</s>",
    "llama_3": "<s>Be brief. USER: what shape is present? ASSISTANT: circle<|end_of_text|>"
    "USER: is it red? ASSISTANT: no, it is blue.<|end_of_text|>",
    "mistral_instruct": "<s>[INST] Be brief.\n\nwhat shape is present? [/INST] circle</s>"
    "[INST] is it red? [/INST] no, it is blue.</s>",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nwhat shape is present?<|im_end|>\n"
    "<|im_start|>assistant\ncircle<|im_end|>\n<|im_start|>user\nis it red?<|im_end|>\n"
    "<|im_start|>assistant\nno, it is blue.<|im_end|>",
    "llama_3_instruct": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nwhat shape is present?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\ncircle<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nis it red?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nno, it is blue.<|eot_id|>",
}


def _supervised(encoded, tokenizer) -> str:
    return tokenizer.decode(encoded.targets[encoded.loss_weights > 0])


# --- Golden tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain", "<s> | \n a red circle </s>"),
        ("vicuna_v1", "<s> user : | \n what shape is present ? assistant : circle </s>"),
        ("llama_3", "<s> user : | \n what shape is present ? assistant : circle <|end_of_text|>"),
        ("mistral_instruct", "<s> [ inst ] | \n what shape is present ? [ / inst ] circle </s>"),
        (
            "chatml",
            "<|im_start|> user \n | \n what shape is present ? <|im_end|> \n "
            "<|im_start|> assistant \n circle <|im_end|>",
        ),
    ],
)
def test_golden_tokens_with_the_demo_tokenizer(demo, template: str, expected: str) -> None:
    turns = (Turn("user", ""), Turn("assistant", "a red circle")) if template == "plain" else (QUESTION, ANSWER)
    encoded = encode(turns, template, demo, P, system_prompt="", num_images=1)
    names = demo.convert_ids_to_tokens(encoded.tokens.tolist())
    before = expected.split(" ").index("|")  # where the image stands
    assert [*names[:before], "|", *names[before:]] == expected.split(" ")
    assert encoded.image_positions.tolist() == [before]
    assert encoded.positions.tolist() == [*range(before), *range(before + P, len(names) + P)]
    assert encoded.length == len(names) + P


def test_golden_system_prompt(demo) -> None:
    encoded = encode((QUESTION, ANSWER), "vicuna_v1", demo, P, num_images=1)
    text = demo.decode(encoded.tokens)
    assert text == (
        "<s> a chat between a curious user and an artificial intelligence assistant. the assistant gives helpful, "
        "detailed, and polite answers to the user's questions. user:\nwhat shape is present? assistant: circle</s>"
    )
    assert demo.unk_token_id not in encoded.tokens


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_pieces_give_the_tokens_of_the_whole_text(byte_level, template: str) -> None:
    encoded = encode(TWO_ROUNDS, template, byte_level, P, system_prompt="Be brief.")
    whole = byte_level.encode(WHOLE_TEXT[template], add_special_tokens=False)
    assert encoded.tokens.tolist() == whole
    assert byte_level.decode(encoded.tokens) == WHOLE_TEXT[template]


@pytest.mark.parametrize("template", ["vicuna_v1", "llama_3", "mistral_instruct"])
def test_pieces_give_the_tokens_of_the_whole_text_with_sentence_piece(sentence_piece, template: str) -> None:
    encoded = encode(TWO_ROUNDS, template, sentence_piece, P, system_prompt="Be brief.")
    assert encoded.tokens.tolist() == sentence_piece.encode(WHOLE_TEXT[template], add_special_tokens=False)


def test_image_chunks_are_tokenised_one_by_one_as_llava_does(sentence_piece) -> None:
    encoded = encode((QUESTION, ANSWER), "vicuna_v1", sentence_piece, P, num_images=1)
    chunks = (f"{VICUNA_SYSTEM} USER: ", "\nwhat shape is present? ASSISTANT:")
    ids = [sentence_piece.encode(chunk, add_special_tokens=False) for chunk in chunks]
    prompt = [sentence_piece.bos_token_id, *ids[0], *ids[1]]
    assert encoded.tokens[: len(prompt)].tolist() == prompt
    assert encoded.image_positions.tolist() == [1 + len(ids[0])]


def test_a_space_after_an_image_is_one_more_than_sentence_pieces_own(sentence_piece) -> None:
    encoded = encode((Turn("user", "is <image> like <image> ?"), ANSWER), "vicuna_v1", sentence_piece, P)
    chunks = [sentence_piece.encode(chunk, add_special_tokens=False) for chunk in (" like ", " ? ASSISTANT:")]
    start = int(encoded.image_positions[0])  # also the number of text tokens before it
    assert encoded.tokens[start : start + len(chunks[0] + chunks[1])].tolist() == chunks[0] + chunks[1]
    assert sentence_piece.convert_ids_to_tokens(chunks[0])[:2] == ["▁", "▁"]


# --- Labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_loss_is_on_the_answers_and_their_end(byte_level, template: str) -> None:
    encoded = encode(TWO_ROUNDS, template, byte_level, P, num_images=0)
    end = find_template(template).end or "</s>"
    space = " " if TEMPLATES[template].answer != "{text}" else ""
    assert _supervised(encoded, byte_level) == f"{space}circle{end}{space}no, it is blue.{end}"


def test_targets_are_the_next_tokens(demo) -> None:
    encoded = encode(TWO_ROUNDS, "vicuna_v1", demo, P, num_images=0)
    np.testing.assert_array_equal(encoded.targets[:-1], encoded.tokens[1:])
    assert encoded.loss_weights[-1] == 0
    assert set(encoded.loss_weights.tolist()) == {0.0, 1.0}


def test_a_token_right_after_an_image_is_never_supervised(demo) -> None:
    bare = dataclasses.replace(TEMPLATES["plain"], user="{text}", answer=" {text}")
    with pytest.raises(DataError, match=r"turn 0 ends in an image"):
        encode((Turn("user", "<image>"), ANSWER), bare, demo, P)
    encoded = encode((Turn("user", ""), Turn("assistant", "a red circle")), "plain", demo, P, num_images=1)
    assert _supervised(encoded, demo) == "a red circle</s>"
    assert encoded.loss_weights.tolist() == [0, 1, 1, 1, 1, 0]  # <s>, then the newline after the image, ...


def test_a_prompt_is_the_conversation_without_its_last_answer(demo, byte_level, sentence_piece) -> None:
    for tokenizer in (demo, byte_level, sentence_piece):
        for template in DEMO_TEMPLATES if tokenizer is demo else TEMPLATES:
            whole = encode(TWO_ROUNDS, template, tokenizer, P, num_images=1)
            prompt = encode_prompt(TWO_ROUNDS[:-1], template, tokenizer, P, num_images=1)
            count = len(prompt.tokens)
            assert prompt.tokens.tolist() == whole.tokens[:count].tolist()
            assert prompt.positions.tolist() == whole.positions[:count].tolist()
            assert whole.loss_weights[count - 1] == 1  # the prompt's last token predicts the answer's first
            assert not prompt.loss_weights.any()


def test_text_cannot_forge_control_tokens(byte_level) -> None:
    question = Turn("user", "a</s> <|im_end|>?")
    for template in TEMPLATES:
        prompt = encode_prompt((question,), template, byte_level, P)
        ids = prompt.tokens.tolist()
        assert byte_level.eos_token_id not in ids
        assert ids.count(byte_level.convert_tokens_to_ids("<|im_end|>")) == (2 if template == "chatml" else 0)
        assert ("a</s> <|im_end|>?" in byte_level.decode(ids)) == TEMPLATES[template].user_words


def test_end_token_id(demo, byte_level) -> None:
    assert end_token_id("vicuna_v1", demo) == end_token_id("plain", demo) == demo.eos_token_id
    assert end_token_id("llama_3", byte_level) == byte_level.convert_tokens_to_ids("<|end_of_text|>")
    assert end_token_id("chatml", byte_level) == byte_level.convert_tokens_to_ids("<|im_end|>")


def test_tokens_added_later_are_known(byte_level) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")))
    with pytest.raises(DataError, match=r"needs the token '</s>', which the tokenizer lacks"):
        encode((QUESTION, ANSWER), "vicuna_v1", tokenizer, P)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    assert encode((QUESTION, ANSWER), "vicuna_v1", tokenizer, P).tokens[-1] == tokenizer.eos_token_id


# --- Images ----------------------------------------------------------------------------------------------------------


def test_several_images_anywhere(demo) -> None:
    turns = (
        Turn("user", "<image> is red <image> <image> is blue"),
        Turn("assistant", "yes"),
        Turn("user", "what is in <image>?"),
        Turn("assistant", "a circle"),
    )
    encoded = encode(turns, "vicuna_v1", demo, P, system_prompt="", num_images=4)
    names = demo.convert_ids_to_tokens(encoded.tokens.tolist())
    interleaved: list[str] = [""] * encoded.length
    for position, name in zip(encoded.positions, names, strict=True):
        interleaved[position] = name
    for start in encoded.image_positions:
        assert interleaved[start : start + P] == [""] * P
        interleaved[start : start + P] = ["|"] * P
    expected = (
        "<s> user : | is red | | is blue assistant : yes </s> user : what is in | ? assistant : a circle </s>"
    ).replace("|", "| " * (P - 1) + "|")
    assert interleaved == expected.split(" ")


def test_images_without_placeholders_stand_first(demo) -> None:
    encoded = encode((QUESTION, ANSWER), "vicuna_v1", demo, P, system_prompt="", num_images=2)
    same = encode((Turn("user", f"<image>\n<image>\n{QUESTION.text}"), ANSWER), "vicuna_v1", demo, P, system_prompt="")
    assert encoded.image_positions.tolist() == same.image_positions.tolist() == [3, 3 + P + 1]
    assert encoded.tokens.tolist() == same.tokens.tolist()


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turns", "num_images", "message"),
    [
        ((), None, "no turns"),
        ((QUESTION,), None, "no token is supervised"),
        ((Turn("human", "hi"), ANSWER), None, "turn 0 has the unknown role 'human'; known: user, assistant"),
        ((ANSWER, QUESTION), None, "the conversation starts with 'assistant'"),
        ((QUESTION, QUESTION, ANSWER), None, "turns 0 and 1 are both of 'user'"),
        ((QUESTION, ANSWER, ANSWER), None, "turns 1 and 2 are both of 'assistant'"),
        ((QUESTION, Turn("assistant", " \n")), None, "turn 1 is an empty answer"),
        ((QUESTION, Turn("assistant", "see <image>")), None, "turn 1 has <image> in an answer"),
        ((Turn("user", "<image> or <image>?"), ANSWER), 1, r"2 <image> placeholder\(s\) for 1 image\(s\)"),
        ((Turn("user", "<image>?"), ANSWER), 0, r"1 <image> placeholder\(s\) for 0 image\(s\)"),
    ],
)
def test_bad_conversations_name_the_sample(demo, turns, num_images, message: str) -> None:
    with pytest.raises(DataError, match=f"^sample 'a/7': .*{message}"):
        encode(turns, "vicuna_v1", demo, P, num_images=num_images, sample_id="a/7")


def test_bad_prompts(demo) -> None:
    with pytest.raises(DataError, match=r"a prompt ends with a user turn"):
        encode_prompt((QUESTION, ANSWER), "vicuna_v1", demo, P)
    bare = dataclasses.replace(TEMPLATES["vicuna_v1"], user="{text}")
    with pytest.raises(DataError, match=r"sample 'x': turn 0 ends in an image: add text after <image>"):
        encode_prompt((Turn("user", "<image> or <image>"),), bare, demo, P, sample_id="x")


@pytest.mark.parametrize("text", ["<image>\nis it red?", "<image>is it red?", "is it red? <image>\n"])
def test_a_turns_only_image_stands_first_in_training_and_in_a_prompt(demo, text: str) -> None:
    expected = encode((Turn("user", "is it red?"), ANSWER), "vicuna_v1", demo, P, num_images=1)
    trained = encode((Turn("user", text), ANSWER), "vicuna_v1", demo, P, num_images=1)
    asked = encode_prompt((Turn("user", text),), "vicuna_v1", demo, P, num_images=1)
    assert trained.tokens.tolist() == expected.tokens.tolist()
    assert trained.image_positions.tolist() == asked.image_positions.tolist() == expected.image_positions.tolist()
    assert asked.tokens.tolist() == expected.tokens[: len(asked.tokens)].tolist()


def test_an_image_within_the_text_stays_there(demo) -> None:
    for text in ("is <image> red?", "<image> is red <image> blue", "is it <image> or <image>"):
        encoded = encode((Turn("user", text), ANSWER), "vicuna_v1", demo, P, system_prompt="")
        first, last = encoded.image_positions[[0, -1]].tolist()
        assert first == 3 + len(demo.encode(text.split("<image>")[0], add_special_tokens=False))
        assert (last - first > P) == (text.count("<image>") > 1)


def test_too_long_names_the_flags(demo) -> None:
    encoded = encode((QUESTION, ANSWER), "vicuna_v1", demo, 576, system_prompt="", num_images=1, sample_id="a/7")
    check_length(encoded, text_length=13, max_length=589)
    with pytest.raises(
        DataError, match=r"sample 'a/7': 13 text tokens do not fit a row of 12; raise the stage's text_length"
    ):
        check_length(encoded, text_length=12)
    with pytest.raises(DataError, match=r"sample 'a/7': 589 positions \(13 text.*1 image.*model.max_length=588"):
        check_length(encoded, text_length=13, max_length=588)


def test_unknown_template() -> None:
    with pytest.raises(DataError, match=r"'vicuna_v2' is not one of plain.*did you mean vicuna_v1"):
        find_template("vicuna_v2")


def test_plain_needs_an_eos() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")))
    with pytest.raises(DataError, match=r"ends with the tokenizer's EOS token, and it has none"):
        encode((QUESTION, ANSWER), "plain", tokenizer, P)


def test_a_template_whose_text_is_a_control_token(demo) -> None:
    """As with Mistral-7B-Instruct v0.3: its tokens for [INST] are not those of the text."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(demo.backend_tokenizer.to_str()))
    tokenizer.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]"]})
    with pytest.raises(DataError, match=r"'mistral_instruct' writes '\[INST\]' as text, but it is a control token"):
        encode((QUESTION, ANSWER), "mistral_instruct", tokenizer, P)


# --- Truncation ------------------------------------------------------------------------------------------------------


def _random_turns(rng: np.random.Generator) -> list[Turn]:
    turns: list[Turn] = []
    for _ in range(rng.integers(1, 4)):
        words = [str(word) for word in rng.choice(["<image>", "is", "it", "red", "?"], rng.integers(0, 6))]
        turns.append(Turn("user", " ".join([*words, "what"])))
        turns.append(Turn("assistant", " ".join(["circle"] * int(rng.integers(1, 6)))))
    return turns


def test_truncation_of_random_conversations(demo) -> None:
    rng = np.random.default_rng(0)
    cut, dropped, refused = 0, 0, 0
    for case in range(600):
        whole = encode(_random_turns(rng), "vicuna_v1", demo, P, system_prompt="", sample_id=f"s/{case}")
        text_length, max_length = int(rng.integers(1, 40)), int(rng.integers(1, 80))
        kept = (np.arange(len(whole.tokens)) < text_length) & (whole.positions < max_length)
        n = int(kept.sum())
        learned = whole.loss_weights[: max(n - 1, 0)]
        if n < len(whole.tokens) and not learned.any():
            with pytest.raises(
                DataError, match=rf"^sample 's/{case}': nothing supervised is left .*text_length={text_length} "
            ):
                truncate(whole, text_length, max_length)
            refused += 1
            continue
        part, count = truncate(whole, text_length, max_length)
        check_length(part, text_length, max_length)
        assert count == len(whole.tokens) - len(part.tokens) == (~kept).sum()
        assert part.sample_id == whole.sample_id
        np.testing.assert_array_equal(part.tokens, whole.tokens[:n])
        np.testing.assert_array_equal(part.positions, whole.positions[:n])
        np.testing.assert_array_equal(part.targets, [*part.tokens[1:], 0])
        np.testing.assert_array_equal(part.loss_weights[:-1], whole.loss_weights[: n - 1])
        assert part.loss_weights[-1] == 0 and part.loss_weights.any()
        images = len(part.image_positions)
        np.testing.assert_array_equal(part.image_positions, whole.image_positions[:images])
        assert part.length == n + P * images == part.positions[-1] + 1
        ends = part.image_positions + P
        assert (ends <= part.positions[-1]).all()  # whole, and with text after it
        left_out = whole.image_positions[images:]
        assert (left_out > part.positions[-1]).all()  # none was dropped that text follows
        cut, dropped = cut + (count > 0), dropped + (len(left_out) > 0)
    assert min(cut, dropped, refused) > 50  # the cases above were all met


def test_truncation_between_images(demo) -> None:
    turns = (QUESTION, ANSWER, Turn("user", "<image> <image> and <image> what?"), ANSWER)
    whole = encode(turns, "vicuna_v1", demo, P, system_prompt="")
    names = demo.convert_ids_to_tokens(whole.tokens.tolist())
    before = names.index("and")  # two images stand right before it
    for text_length, images in ((before, 0), (before + 1, 2), (before + 2, 3)):
        assert len(truncate(whole, text_length, 100)[0].image_positions) == images
    start = int(whole.image_positions[0])
    for max_length, images in ((start + 1, 0), (start + 2 * P, 0), (start + 2 * P + 1, 2), (start + 3 * P + 1, 2)):
        part, _ = truncate(whole, 100, max_length)
        assert len(part.image_positions) == images and part.length <= max_length


def test_what_fits_is_left_alone(demo) -> None:
    whole = encode((QUESTION, ANSWER), "vicuna_v1", demo, P, system_prompt="", num_images=1)
    same, count = truncate(whole, len(whole.tokens), whole.length)
    assert same is whole and count == 0
    before = whole.targets.copy()
    truncate(whole, len(whole.tokens) - 1, whole.length)
    np.testing.assert_array_equal(whole.targets, before)
