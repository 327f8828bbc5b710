"""What each template supervises, word for word, and that it writes what a model's own chat template writes."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from saisa_jax.data.rows.collate import Example, pack_rows
from saisa_jax.data.sample import DataError, Turn
from saisa_jax.data.text.conversation import Encoded, encode, end_token_id
from saisa_jax.data.text.templates import TEMPLATES

P = 4
ENDS = {
    "plain": "</s>",
    "vicuna_v1": "</s>",
    "llama_3": "<|end_of_text|>",
    "mistral_instruct": "</s>",
    "chatml": "<|im_end|>",
    "llama_3_instruct": "<|eot_id|>",
}
SPACED = ("vicuna_v1", "llama_3", "mistral_instruct")  # a space between the prompt and the answer

# (turns, the sample's own system prompt)
CASES: dict[str, tuple[tuple[Turn, ...], str | None]] = {
    "text only": ((Turn("user", "what shape?"), Turn("assistant", "a circle")), None),
    "several turns": (
        (
            Turn("user", "<image>\nis it red?"),
            Turn("assistant", "no"),
            Turn("user", "what is it?"),
            Turn("assistant", "it is a circle:\n\nUSER: blue 🙂 日本"),
            Turn("user", "is it red?"),
            Turn("assistant", "</s> no <|eot_id|>"),  # what looks like control tokens is text
        ),
        None,
    ),
    "a system prompt": ((Turn("user", "<image>\nis it red?"), Turn("assistant", "no")), "Be brief. Be\n\nkind."),
    "no system prompt": ((Turn("user", "<image>\nis it red?"), Turn("assistant", "no")), ""),
    "several images": (
        (
            Turn("user", "is <image> like <image>?"),
            Turn("assistant", "yes, circle"),
            Turn("user", "and <image><image> too?"),
            Turn("assistant", "no"),
        ),
        "Be brief.",
    ),
}


def supervised(encoded: Encoded, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Runs of supervised targets; an answer and its end token are one run."""
    runs: list[list[int]] = []
    before = 0.0
    for target, weight in zip(encoded.targets.tolist(), encoded.loss_weights, strict=True):
        if weight:
            runs += [] if before else [[]]
            runs[-1].append(target)
        before = weight
    return runs


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_labels_are_the_answers_and_their_ends(byte_level, template: str, case: str) -> None:
    turns, system = CASES[case]
    encoded = encode(turns, template, byte_level, P, system_prompt=system)
    end = byte_level.convert_tokens_to_ids(ENDS[template])
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    runs = supervised(encoded, byte_level)
    assert len(runs) == len(answers)
    for run, answer in zip(runs, answers, strict=True):
        *words, last = run
        assert last == end and end not in words
        assert byte_level.decode(words) == (" " if template in SPACED else "") + answer


@pytest.mark.parametrize("template", TEMPLATES)
def test_labels_with_sentence_piece(sentence_piece, template: str) -> None:
    turns, system = CASES["several images"]
    runs = supervised(encode(turns, template, sentence_piece, P, system_prompt=system), sentence_piece)
    assert [sentence_piece.decode(run) for run in runs] == [
        f"yes, circle{ENDS[template]}",
        f"no{ENDS[template]}",
    ]


@pytest.mark.parametrize("template", [name for name in TEMPLATES if TEMPLATES[name].system_format])
def test_a_system_prompt_stands_in_front_of_the_first_turn_alone(byte_level, template: str) -> None:
    turns, _ = CASES["several turns"]
    with_one, without = (encode(turns, template, byte_level, P, system_prompt=system) for system in ("Be brief.", ""))
    assert byte_level.decode(with_one.tokens).count("Be brief.") == 1
    assert byte_level.decode(without.tokens).count("Be brief.") == 0
    added = len(with_one.tokens) - len(without.tokens)
    behind = int(without.image_positions[0])  # text tokens before the image
    assert with_one.tokens[behind + added :].tolist() == without.tokens[behind:].tolist()
    assert with_one.image_positions.tolist() == [behind + added]


# --- As the models' own chat templates --------------------------------------------------------------------------------

# Written anew, to the same effect as those that the models come with.
OWN = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "llama_3_instruct": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}",
}


@pytest.mark.parametrize("template", OWN)
def test_the_tokens_of_a_models_own_chat_template(byte_level, template: str) -> None:
    turns, system = CASES["several turns"]
    turns = [Turn(turn.role, turn.text.replace("<image>\n", "").replace("</s>", "").strip()) for turn in turns[:4]]
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    for system in ("Be brief.", ""):
        whole = [{"role": "system", "content": system}, *messages] if system else messages
        theirs = byte_level.apply_chat_template(whole, chat_template=OWN[template], return_dict=False)
        ours = encode(turns, template, byte_level, P, system_prompt=system).tokens.tolist()
        after = byte_level.encode(TEMPLATES[template].after, add_special_tokens=False)
        assert [*ours, *after] == theirs


# --- Llama 3, which has no padding token ------------------------------------------------------------------------------


def test_padding_is_not_learned_even_where_it_is_the_end_token(llama_3) -> None:
    """The loss weights decide, not the ids."""
    assert llama_3.pad_token_id == llama_3.eos_token_id == end_token_id("llama_3", llama_3) == 0
    turns, _ = CASES["text only"]
    encoded = encode(turns, "llama_3", llama_3, P, system_prompt="")
    batch = pack_rows([[Example(encoded, ())]], len(encoded.tokens) + 20, 0, 8)
    learned = batch["targets"][batch["loss_weights"] > 0]
    assert llama_3.decode(learned) == " a circle<|end_of_text|>"
    assert (batch["targets"] == 0).sum() > 20  # padding looks like the end


def test_a_padding_token_added_later_changes_nothing(llama_3) -> None:
    turns, _ = CASES["several turns"]
    before = encode(turns, "llama_3_instruct", llama_3, P)
    llama_3.add_special_tokens({"pad_token": "<pad>"})
    after = encode(turns, "llama_3_instruct", llama_3, P)
    assert llama_3.pad_token_id == len(llama_3) - 1  # a row more of the embedding
    assert after.tokens.tolist() == before.tokens.tolist()
    assert llama_3.pad_token_id not in after.tokens
    assert after.tokens[0] == llama_3.bos_token_id
    assert [llama_3.decode(run) for run in supervised(after, llama_3)] == [
        "no<|eot_id|>",
        "it is a circle:\n\nUSER: blue 🙂 日本<|eot_id|>",
        "</s> no <|eot_id|><|eot_id|>",
    ]


def test_the_demo_tokenizer_lacks_llama_3_instructs_tokens(demo) -> None:
    turns, _ = CASES["text only"]
    with pytest.raises(
        DataError, match=r"'llama_3_instruct' needs the token '<\|eot_id\|>', which the tokenizer lacks"
    ):
        encode(turns, "llama_3_instruct", demo, P)
