"""How an imported model wants to be spoken to: its tokenizer, template and system prompt."""

from __future__ import annotations

import contextlib
from typing import Any

from absl import logging

from saisa_jax.convert.rows import ConvertError
from saisa_jax.data.sample import DataError
from saisa_jax.data.text.conversation import end_token_id, fitting_template
from saisa_jax.data.text.frames import default_system
from saisa_jax.data.text.templates import TEMPLATES, find_template

# What stands before each turn, by which a tokenizer's own chat template is known.
HEADERS = {"chatml": "<|im_start|>", "llama_3_instruct": "<|start_header_id|>"}


def find_chat_template(
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
    fitting = None
    if chat and not multimodal:
        with contextlib.suppress(DataError):  # a chat template that cannot be used
            fitting = fitting_template(tokenizer)
    name = template or fitting or _guess(tokenizer, "" if multimodal else chat)
    if fitting not in (name, None):
        logging.warning("template %s writes otherwise than the tokenizer's own chat template", name)
    try:
        end_token_id(find_template(name), tokenizer)
    except DataError as error:
        raise ConvertError(f"--template={name} does not fit the tokenizer: {error}") from error
    if system_prompt is None and name in TEMPLATES and (name == fitting or HEADERS.get(name, "\0") in chat):
        system_prompt = default_system(tokenizer, TEMPLATES[name])
    return name, system_prompt


def _guess(tokenizer: Any, chat: str) -> str:
    for name, header in HEADERS.items():
        if header in chat:
            return name
    if "[INST]" in chat:
        return "mistral_instruct"
    vocabulary = tokenizer.get_vocab()
    for token, name in (("</s>", "vicuna_v1"), ("<|end_of_text|>", "llama_3"), ("<|im_end|>", "chatml")):
        if token in vocabulary:
            return name
    raise ConvertError("no template is known that ends its answers with a token of this tokenizer: say --template=NAME")
