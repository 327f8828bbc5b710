"""How an imported model wants to be spoken to: its template, system prompt and end tokens."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any

from absl import logging

from saisa_jax.convert.rows import ConvertError
from saisa_jax.data.sample import DataError
from saisa_jax.data.text.conversation import end_token_id, fitting_template
from saisa_jax.data.text.frames import default_system
from saisa_jax.data.text.templates import TEMPLATES, Template, find_template

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


def find_end_tokens(
    config: Mapping[str, Any], generation_config: Mapping[str, Any], tokenizer: Any, vocab_size: int
) -> tuple[int, ...]:
    """Every token that ends an answer of this model, whoever says so; sorted.

    Chat models have several: the one of a turn in generation_config.json, that of a document in the tokenizer.

    Args:
      config: of config.json; a multimodal one says it in its text_config.
      generation_config: of generation_config.json; empty: there is none.
      tokenizer: None: the model has none.
    """
    said = [source.get("eos_token_id") for source in (generation_config, config, config.get("text_config") or {})]
    said.append(getattr(tokenizer, "eos_token_id", None))
    tokens = {token for ids in said for token in (ids if isinstance(ids, list) else [ids])}
    return tuple(sorted(token for token in tokens if isinstance(token, int) and 0 <= token < vocab_size))


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


# Of a turn's content in parts, and where its image stands: as `data/text/conversation.py` has it.
_TURNS = """\
{%- set found = namespace(turns=[]) -%}
{%- for message in messages -%}
  {%- set turn = namespace(text=message['content'] if message['content'] is string else '') -%}
  {%- for part in ([] if message['content'] is string else message['content']) -%}
    {%- set turn.text = turn.text + ('<image>' if part['type'] == 'image' else part['text']) -%}
  {%- endfor -%}
  {%- set text = turn.text | trim -%}
  {%- set words = text.replace('<image>', '') | trim -%}
  {%- if message['role'] == 'user' and words and text.split('<image>') | length == 2 and
      (text.startswith('<image>') or text.endswith('<image>')) -%}
    {%- set text = '<image>\n' + words -%}
  {%- endif -%}
  {%- set found.turns = found.turns + [{'role': message['role'], 'content': text}] -%}
{%- endfor -%}
{%- set messages = found.turns -%}
"""
_WORDS = """\
{%- set system = SYSTEM -%}
{%- if messages and messages[0]['role'] == 'system' -%}
  {%- set system = messages[0]['content'] -%}
  {%- set messages = messages[1:] -%}
{%- endif -%}
{{- BOS -}}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- ('' if loop.first else AFTER) + FIRST -}}
    {%- if loop.first and system and TAKES_SYSTEM -%}{{- BEFORE_SYSTEM + system + AFTER_SYSTEM -}}{%- endif -%}
    {{- LEAD + SAID + TAIL -}}
  {%- else -%}
    {{- BEFORE_ANSWER + message['content'] + AFTER_ANSWER + END -}}
  {%- endif -%}
{%- endfor -%}
"""


def multimodal_chat_template(tokenizer: Any, template: Template | str, system_prompt: str | None) -> str:
    """The chat template, in Jinja, of a model that was trained with `template`; contents may be lists with images.

    Args:
      template: one of ours, or "tokenizer": the tokenizer's own, which is kept.
      system_prompt: None: the template's.
    """
    template = find_template(template)
    if template.own:
        return _TURNS + str(tokenizer.chat_template).removeprefix(_TURNS)
    before, tail = template.user.split("{text}")
    first, _, lead = before.partition("{system}") if "{system}" in before else ("", "", before)
    before_system, _, after_system = template.system_format.partition("{system}")
    before_answer, after_answer = template.answer.split("{text}")
    words = {
        "SYSTEM": template.system if system_prompt is None else system_prompt,
        "BOS": str(tokenizer.bos_token or "") if template.bos else "",
        "BEFORE_SYSTEM": before_system,
        "AFTER_SYSTEM": after_system,
        "BEFORE_ANSWER": before_answer,
        "AFTER_ANSWER": after_answer,
        "AFTER": template.after,
        "FIRST": first,
        "LEAD": lead,
        "TAIL": tail,
        "END": template.end or str(tokenizer.eos_token),
    }
    jinja = {name: json.dumps(value) for name, value in words.items()}
    jinja["SAID"] = "message['content']"
    jinja["TAKES_SYSTEM"] = "true" if template.system_format else "false"
    if not template.user_words:  # of a user's turn its images alone
        jinja["SAID"] = "'<image>' * (message['content'].split('<image>') | length - 1)"
    return _TURNS + re.sub(rf"\b({'|'.join(jinja)})\b", lambda found: jinja[found[0]], _WORDS)
