"""How an imported model wants to be spoken to: its tokenizer, template and system prompt."""

from __future__ import annotations

import re
from typing import Any

from saisa_jax.convert.tables import ConvertError
from saisa_jax.data.conversation import end_token_id
from saisa_jax.data.sample import DataError
from saisa_jax.data.templates import find_template


def find_dialogue(
    tokenizer: Any, multimodal: bool, template: str | None, system_prompt: str | None
) -> tuple[str, str | None]:
    """(template, system prompt; None: the template's own) of a model with this tokenizer.

    Args:
      multimodal: a checkpoint of LLaVA or SAISA, which were trained on Vicuna's words whatever their decoder.
      template: the user's choice.
      system_prompt: the user's choice.

    Raises:
      ConvertError: no template fits, or the chosen one does not.
    """
    chat = tokenizer.chat_template or ""
    chat = chat if isinstance(chat, str) else str(chat)
    name = template or _guess(tokenizer, "" if multimodal else chat)
    try:
        end_token_id(find_template(name), tokenizer)
    except DataError as error:
        raise ConvertError(f"--template={name} does not fit the tokenizer: {error}") from error
    if system_prompt is None and name == "chatml" and "<|im_start|>" in chat:
        system_prompt = _chatml_system(tokenizer)
    return name, system_prompt


def _guess(tokenizer: Any, chat: str) -> str:
    if "<|im_start|>" in chat:
        return "chatml"
    if "[INST]" in chat:
        return "mistral_instruct"
    if "<|start_header_id|>" in chat:
        raise ConvertError(
            "no template here has the header tokens of Llama-3-Instruct; --template=llama_3 asks in SAISA's words"
        )
    vocabulary = tokenizer.get_vocab()
    for token, name in (("</s>", "vicuna_v1"), ("<|end_of_text|>", "llama_3"), ("<|im_end|>", "chatml")):
        if token in vocabulary:
            return name
    raise ConvertError("no template is known that ends its answers with a token of this tokenizer: say --template=NAME")


def _chatml_system(tokenizer: Any) -> str:
    """What the tokenizer's own chat template puts before a conversation that has no system prompt; "": nothing."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    found = re.search(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", str(text), re.DOTALL)
    return found[1] if found else ""
