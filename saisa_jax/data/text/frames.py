"""The words around the turns of a conversation: those of a template of ours, or of the tokenizer's chat template.

A chat template is a program that writes a whole conversation. It is run once for each number of turns, with marks in
the place of what both sides say; what stands between the marks are its words. So an answer is known to the token, as
with our own templates, and what is said is never searched for control tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from saisa_jax.data.sample import DataError
from saisa_jax.data.text.templates import Template

SYSTEM = "\ue000system\ue001"  # stands for the system prompt


@dataclass(frozen=True)
class Frame:
    """A template's words for a number of questions with their answers."""

    leads: tuple[str, ...]  # before each question; `SYSTEM` within the one that has the system prompt
    tails: tuple[str, ...]  # from each question to where the assistant speaks
    answer: str  # {text}, with what belongs to an answer around it
    end: str | None  # the token that ends an answer; None: the tokenizer's EOS
    controls: tuple[str, ...]  # tokens, not text, within leads and tails


def written_frame(template: Template, questions: int, with_system: bool) -> Frame:
    """The frame of a template of ours."""
    before, after = template.user.split("{text}")
    first = before.replace("{system}", template.system_format.replace("{system}", SYSTEM) if with_system else "")
    later = template.after + before.replace("{system}", "")
    leads = (first, *[later] * (questions - 1))
    return Frame(leads, (after,) * questions, template.answer, template.end, template.controls)


def own_frame(tokenizer: Any, questions: int, with_system: bool) -> Frame:
    """The frame of the tokenizer's own chat template.

    Where its prompt for an answer (`add_generation_prompt`) is what stands before an answer but for spaces, those
    spaces belong to the answer; a prompt of its own that no answer ever followed is left out.

    Raises:
      DataError: it has none, it refuses the turns or leaves one out, or an answer does not end in a token of its own.
    """
    if not tokenizer.chat_template:
        raise DataError("template 'tokenizer': this tokenizer has no chat template; name one of ours instead")
    marks = [f"\ue000{role}{number}\ue001" for number in range(questions) for role in ("user", "assistant")]
    messages = [{"role": ("user", "assistant")[number % 2], "content": mark} for number, mark in enumerate(marks)]
    if with_system:
        messages.insert(0, {"role": "system", "content": SYSTEM})
    whole = _rendered(tokenizer, messages, False)
    words = re.split("|".join(marks), whole)
    if re.findall("\ue000(?:user|assistant)\\d+\ue001", whole) != marks or whole.count(SYSTEM) != with_system:
        raise _wrong("leaves out, moves or repeats what is said")
    prompt = _rendered(tokenizer, messages[:-1], True).rpartition(marks[-2])[2]
    befores, afters = words[1::2], words[2::2]
    rest = befores[-1].removeprefix(prompt)
    space = rest if befores[-1].startswith(prompt) and not rest.strip(" ") else _end_spaces(befores[-1])
    controls = tuple(
        sorted({token.content for token in tokenizer.added_tokens_decoder.values()}, key=len, reverse=True)
    )
    ends = [re.match(rf"(\s*)({'|'.join(map(re.escape, controls))})", after) for after in afters]
    found = {(end[1], end[2]) for end in ends if end is not None}
    if None in ends or len(found) != 1:
        raise _wrong(f"ends an answer with {afters[0][:40]!r}, which is no token of its own")
    if not all(before.endswith(space) for before in befores):
        raise _wrong("writes something else before each answer")
    ((after_space, end),) = found
    skip = len(after_space) + len(end)
    return Frame(
        leads=(words[0], *[after[skip:] for after in afters[:-1]]),
        tails=tuple(before.removesuffix(space) for before in befores),
        answer=f"{space}{{text}}{after_space}",
        end=end,
        controls=controls,
    )


def default_system(tokenizer: Any, template: Template) -> str | None:
    """The system prompt that the tokenizer's chat template writes by itself, as one to give to a template of ours.

    "": none; None: the one that is the template's own as well.
    """
    text = _rendered(tokenizer, [{"role": "user", "content": "?"}], False)
    if template.system and template.system_format.replace("{system}", template.system) in text:
        return None
    before, _, after = template.system_format.partition("{system}")
    if not before or not after:
        return ""  # nothing tells it from what else is written
    found = re.search(f"{re.escape(before)}(.*?){re.escape(after)}", text, re.DOTALL)
    return found[1] if found else ""


def _end_spaces(text: str) -> str:
    return text[len(text.rstrip(" ")) :]


def _rendered(tokenizer: Any, messages: list[dict[str, str]], prompt: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # jinja's errors, and those that a template raises
        raise _wrong(f"cannot be used: {error}") from error


def _wrong(what: str) -> DataError:
    return DataError(
        f"template 'tokenizer': the tokenizer's chat template {what}; name one of ours instead (pretrain.template, "
        "finetune.template; import: --template)"
    )
