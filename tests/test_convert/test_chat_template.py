"""Which template an imported model is spoken to in, and with which system prompt."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from saisa_jax.convert.chat_template import find_chat_template
from saisa_jax.convert.rows import ConvertError
from saisa_jax.testing import tokenizers

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LLAMA_3 = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
)


def tokenizer(*tokens: str, chat: str | None = None) -> PreTrainedTokenizerFast:
    vocabulary = {token: number for number, token in enumerate(("?", *tokens))}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="?")))
    made.add_special_tokens({"additional_special_tokens": [token for token in tokens if token != "[INST]"]})
    made.chat_template = chat
    return made


HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")


@pytest.mark.parametrize(
    ("made", "multimodal", "expected"),
    [
        (tokenizer("</s>"), False, ("vicuna_v1", None)),
        (tokenizer("<|end_of_text|>"), False, ("llama_3", None)),
        (tokenizer("</s>", chat="[INST] {{ messages[0].content }} [/INST]"), False, ("mistral_instruct", None)),
        (tokenizer("<|im_start|>", "<|im_end|>", chat=CHATML), False, ("chatml", "")),
        (tokenizer(*HEADERS, chat=LLAMA_3), False, ("llama_3_instruct", "")),
        # Llama 3.1 and later say the date where nobody says anything.
        (
            tokenizer(*HEADERS, chat="<|start_header_id|>system<|end_header_id|>\n\nToday:\n\n<|eot_id|>" + LLAMA_3),
            False,
            ("llama_3_instruct", "Today:\n\n"),
        ),
        # SAISA's own training, on Llama-3-Instruct's tokenizer.
        (tokenizer(*HEADERS, chat=LLAMA_3), True, ("llama_3", None)),
    ],
)
def test_the_template_that_fits(made, multimodal: bool, expected: tuple[str, str | None]) -> None:
    assert find_chat_template(made, multimodal, None, None) == expected


def test_the_users_choice_comes_first() -> None:
    made = tokenizer(*HEADERS, chat=LLAMA_3)
    assert find_chat_template(made, False, "llama_3", "Be kind.") == ("llama_3", "Be kind.")
    assert find_chat_template(made, False, None, "Be kind.") == ("llama_3_instruct", "Be kind.")
    with pytest.raises(ConvertError, match=r"--template=chatml does not fit the tokenizer: .*needs the token"):
        find_chat_template(made, False, "chatml", None)


def test_no_template_fits() -> None:
    with pytest.raises(ConvertError, match=r"say --template=NAME"):
        find_chat_template(tokenizer("a"), False, None, None)


ZEPHYR = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"


def test_a_chat_template_that_none_of_ours_is_like(caplog) -> None:
    made = tokenizers.byte_level()
    made.chat_template = ZEPHYR
    assert find_chat_template(made, False, None, None) == ("tokenizer", None)
    assert find_chat_template(made, True, None, None) == ("vicuna_v1", None)  # LLaVA's and SAISA's training
    with caplog.at_level("WARNING", "absl"):
        assert find_chat_template(made, False, "vicuna_v1", None) == ("vicuna_v1", None)
    assert "template vicuna_v1 writes otherwise than the tokenizer's own chat template" in caplog.text


def test_what_the_chat_template_says_by_itself_is_given_to_ours() -> None:
    made = tokenizers.byte_level()
    made.chat_template = "<|im_start|>system\nBe kind.<|im_end|>\n" + CHATML
    assert find_chat_template(made, False, None, None) == ("chatml", "Be kind.")
    made.chat_template = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + CHATML
    assert find_chat_template(made, False, None, None) == ("chatml", None)
