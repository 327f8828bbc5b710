"""The tokenizer's own chat template: the tokens that it writes, labels by turn, and when one of ours is the same."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from saisa_jax.data.rows.counts import fingerprint
from saisa_jax.data.sample import DataError, Turn
from saisa_jax.data.text.conversation import encode, encode_prompt, end_token_id, fitting_template
from saisa_jax.data.text.templates import VICUNA_SYSTEM
from saisa_jax.testing import tokenizers
from saisa_jax.testing.configs import tiny_config

P = 4
TURNS = (
    Turn("user", "what shape is present?"),
    Turn("assistant", "a circle: blue 🙂"),
    Turn("user", "is it red?"),
    Turn("assistant", "no"),
    Turn("user", "what is it?"),
    Turn("assistant", "it is </s> <|im_end|> blue."),  # what looks like control tokens is text
)
# Written anew, to the same effect as those that the models come with.
CHAT = {
    # TinyLlama and Zephyr: the headers are text.
    "zephyr": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "llama_2": "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ (s if loop.first else '') + m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}",
    "deepseek": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}\n\n"
    "{% elif m.role == 'assistant' %}Assistant: {{ m.content }}{{ eos_token }}{% else %}{{ m.content }}\n\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}",
    # Mistral v0.3: the system prompt stands before the last question.
    "mistral_v3": "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ (s if loop.index >= messages | length - 1 else '') + m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "qwen": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # Without thinking: an empty thought before the last answer alone, and in the prompt for it where one asks so.
    "qwen3": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    "llama_3": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
}
ENDS = dict.fromkeys(CHAT, "</s>") | {"qwen": "<|im_end|>", "qwen3": "<|im_end|>", "llama_3": "<|eot_id|>"}


@pytest.fixture(params=["bytes", "SentencePiece"])
def tokenizer(request):
    return tokenizers.byte_level() if request.param == "bytes" else tokenizers.sentence_piece()


def messages(turns, system: str) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *({"role": turn.role, "content": turn.text} for turn in turns)]


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("name", CHAT)
def test_tokens_are_those_of_the_chat_template(tokenizer, name: str, system: str) -> None:
    tokenizer.chat_template = CHAT[name]
    for turns in (TURNS[:2], TURNS[:4]):
        text = tokenizer.apply_chat_template(messages(turns, system), tokenize=False)
        text = text[: text.rindex(ENDS[name]) + len(ENDS[name])]  # what follows the last answer's end is left out
        encoded = encode(turns, "tokenizer", tokenizer, P, system_prompt=system)
        assert encoded.tokens.tolist() == tokenizer.encode(text, add_special_tokens=False)
        prompt = encode_prompt(turns[:-1], "tokenizer", tokenizer, P, system_prompt=system)
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        text = tokenizer.apply_chat_template(messages(turns[:-1], system), **options)
        assert prompt.tokens.tolist() == tokenizer.encode(text, add_special_tokens=False)
        if name != "mistral_v3" or not system:
            assert encoded.tokens[: len(prompt.tokens)].tolist() == prompt.tokens.tolist()


@pytest.mark.parametrize("name", CHAT)
def test_labels_are_the_answers_and_their_ends(tokenizer, name: str) -> None:
    tokenizer.chat_template = CHAT[name]
    turns = (Turn("user", f"<image>\n{TURNS[0].text}"), *TURNS[1:])
    encoded = encode(turns, "tokenizer", tokenizer, P, system_prompt="Be brief.", num_images=1)
    end = end_token_id("tokenizer", tokenizer)
    assert end == tokenizer.convert_tokens_to_ids(ENDS[name])
    assert encoded.tokens.tolist().count(end) >= 3
    runs: list[list[int]] = [[]]
    for target, weight in zip(encoded.targets.tolist(), encoded.loss_weights, strict=True):
        if weight:
            runs[-1].append(target)
        elif runs[-1]:
            runs.append([])
    said = [tokenizer.decode([i for i in run if i != end]) for run in runs if run]
    known = lambda text: tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))  # noqa: E731
    assert [text.strip() for text in said[:2]] == [known(turn.text).strip() for turn in TURNS[1:4:2]]
    assert all(run[-1] == end and run.count(end) == 1 for run in runs if run)
    assert len(encoded.image_positions) == 1


def test_system_prompts_and_turns_cannot_forge_control_tokens() -> None:
    byte_level = tokenizers.byte_level()
    byte_level.chat_template = CHAT["qwen"]
    encoded = encode(TURNS, "tokenizer", byte_level, P, system_prompt="<|im_end|> </s>")
    assert encoded.tokens.tolist().count(byte_level.convert_tokens_to_ids("<|im_end|>")) == 7
    assert byte_level.eos_token_id not in encoded.tokens


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("zephyr", "tokenizer"),
        ("llama_2", "tokenizer"),
        ("deepseek", "tokenizer"),
        ("qwen", "chatml"),
        ("qwen3", "tokenizer"),
        ("llama_3", "llama_3_instruct"),
        ("vicuna", "vicuna_v1"),
    ],
)
def test_one_of_ours_is_taken_where_it_writes_the_same(name: str, expected: str) -> None:
    vicuna = "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }}{% elif m.role == 'assistant' %}" + (
        " ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )
    tokenizer = tokenizers.byte_level()
    tokenizer.chat_template = CHAT.get(name, f"{{{{ bos_token }}}}{VICUNA_SYSTEM} {vicuna}")
    assert fitting_template(tokenizer) == expected


def test_no_chat_template_or_none_that_can_be_used(byte_level) -> None:
    with pytest.raises(DataError, match=r"this tokenizer has no chat template; name one of ours"):
        fitting_template(byte_level)
    for chat, message in (
        ("{{ messages[0].content }}", "leaves out, moves or repeats what is said"),
        ("{{ raise_exception('no turns today') }}", "cannot be used: no turns today"),
        (
            "{% for m in messages %}# {{ m.role }}\n{{ m.content }}\n{% endfor %}",
            r"ends an answer with '\n', which is no token",
        ),
        (
            "{% for m in messages %}{{ loop.index }}: {{ m.content }}{{ eos_token }}{% endfor %}",
            None,
        ),
    ):
        tokenizer = tokenizers.byte_level()
        tokenizer.chat_template = chat
        if message is None:
            assert encode(TURNS, "tokenizer", tokenizer, P).loss_weights.any()
            continue
        with pytest.raises(DataError, match=re.escape(message) + r".*name one of ours instead \(pretrain.template"):
            encode(TURNS, "tokenizer", tokenizer, P)


def test_counts_are_made_anew_for_another_chat_template() -> None:
    config, tokenizer, marks = tiny_config(), tokenizers.byte_level(), set()
    own = dataclasses.replace(config, finetune=dataclasses.replace(config.finetune, template="tokenizer"))
    for name in ("zephyr", "qwen"):
        tokenizer.chat_template = CHAT[name]
        marks.add(fingerprint(own, "finetune", tokenizer))
    assert len(marks) == 2


def test_it_is_kept_with_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = tokenizers.byte_level()
    tokenizer.chat_template = CHAT["zephyr"]
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    ours, theirs = (encode(TURNS, "tokenizer", t, P).tokens.tolist() for t in (again, tokenizer))
    assert ours == theirs
