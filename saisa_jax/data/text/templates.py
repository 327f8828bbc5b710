"""Prompt templates: how a conversation is written."""

from __future__ import annotations

from dataclasses import dataclass, replace

from saisa_jax.data.sample import DataError
from saisa_jax.errors import did_you_mean

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Template:
    """How a conversation is written."""

    name: str
    user: str  # a user's turn up to where the assistant speaks; {system} is filled in the first turn alone
    answer: str  # the assistant's turn, without its end token
    end: str | None  # the token that ends an answer; None: the tokenizer's EOS
    system: str = ""  # the default system prompt
    system_format: str = ""  # how a system prompt that is not empty is written
    after: str = ""  # between the end token and the next turn, not supervised
    controls: tuple[str, ...] = ()  # tokens, not text, within `user`, `system_format` and `after`
    bos: bool = True
    user_words: bool = True  # False: of a user's turn its images alone
    own: bool = False  # the tokenizer's own chat template says the rest (`frames.py`)


_VICUNA = Template(
    name="vicuna_v1",
    user="{system}USER: {text} ASSISTANT:",
    answer=" {text}",
    end="</s>",
    system=VICUNA_SYSTEM,
    system_format="{system} ",
)

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        # Stage 1. The newline keeps the image away from the first word of the caption, which would have no text token
        # to be predicted from.
        # LLaVA leaves out what the user says ("Describe the image concisely."): image and caption are all.
        Template(name="plain", user="{text}\n", answer="{text}", end=None, user_words=False),
        _VICUNA,
        # SAISA's own for Llama 3: Vicuna's words, another end token; not the header tokens of Llama-3-Instruct.
        replace(_VICUNA, name="llama_3", end="<|end_of_text|>"),
        # Mistral-7B-Instruct v0.1 and v0.2, where [INST] is text; v0.3 made a token of it.
        Template(
            name="mistral_instruct",
            user="[INST] {system}{text} [/INST]",
            answer=" {text}",
            end="</s>",
            system_format="{system}\n\n",
        ),
        Template(
            name="chatml",
            user="{system}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
            answer="{text}",
            end="<|im_end|>",
            system="You are a helpful assistant.",
            system_format="<|im_start|>system\n{system}<|im_end|>\n",
            after="\n",
            controls=("<|im_start|>", "<|im_end|>"),
            bos=False,
        ),
        Template(
            name="llama_3_instruct",
            user="{system}<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            answer="{text}",
            end="<|eot_id|>",
            system_format="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
            controls=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ),
    )
}


# Whatever the tokenizer's own chat template writes.
OWN = Template(name="tokenizer", user="{text}", answer="{text}", end=None, bos=False, own=True)
NAMES = (*TEMPLATES, OWN.name)


def find_template(name: Template | str) -> Template:
    """The template of that name.

    Raises:
      DataError: there is none; the message says which there are.
    """
    if isinstance(name, Template):
        return name
    if name == OWN.name:
        return OWN
    if name not in TEMPLATES:
        raise DataError(f"template={name!r} is not one of {', '.join(NAMES)}{did_you_mean(str(name), NAMES)}")
    return TEMPLATES[name]
