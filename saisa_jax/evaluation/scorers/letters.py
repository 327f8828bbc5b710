"""Which letter of a multiple choice an answer means."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# --- ScienceQA -------------------------------------------------------------------------------------------------------


def scienceqa_llava(output: str, choices: int) -> str:
    """LLaVA's eval_science_qa.py: "B", "B. words", or one "The answer is B." (a sign must follow it); "": none."""
    output = output.strip()
    if output and output[0] in "ABCDE" and (len(output) == 1 or (len(output) > 2 and output[1:3] == ". ")):
        letter = output[0]
    else:
        found = re.findall(r"The answer is ([A-Z]).", output)
        letter = found[0] if len(found) == 1 else ""
    return letter if letter and letter in LETTERS[: min(choices, 5)] else ""


def scienceqa_lmms(output: str) -> str:
    """lmms-eval: a letter of either case alone, or a capital with a full stop after it ("B. words")."""
    output = output.strip()
    return output[0].upper() if len(output) == 1 or (output[:1].isupper() and output[1:2] == ".") else output


# --- A letter in front -----------------------------------------------------------------------------------------------


def seed_lmms(output: str) -> str:
    """lmms-eval for SEED-Bench: the first character, so that "Because" means B."""
    return output.strip()[:1].upper()


def mmstar_authors(output: str) -> str:
    """MMStar's own script: a letter first, or after "(", "option " or "the answer is "."""
    output = output.strip().lower().replace("\n", " ")
    for start in ("the answer is ", "option ", "("):
        if output.startswith(start):
            return output[len(start) :][:1].upper()
    return output[:1].upper()


def cv_bench(output: str) -> str:
    """lmms-eval for CV-Bench: the first letter, whatever it begins ("(B)", "b.", but also "The" for T)."""
    found = re.match(r"[(\s]*([A-Z])", output.strip(), re.IGNORECASE)
    return found[1].upper() if found else ""


_MMVP = (
    r"^\s*\(?([AB])\)?\.?\s*$",
    r"^\s*\(?([AB])\)?[\.\s]",
    r"answer\s+is\s+\(?([AB])\)?",
    r"option\s+\(?([AB])\)?",
    r"\(?([AB])\)?(?:\s|$)",
)


def mmvp(output: str) -> str:
    """lmms-eval for MMVP: the letter alone, in front, after "answer is" or "option", or at the end of any word."""
    output = output.strip()
    for pattern in _MMVP:
        if found := re.search(pattern, output, re.IGNORECASE):
            return found[1].upper()
    return output[:1].upper() if output[:1].upper() in ("A", "B") else ""


# --- A letter anywhere -----------------------------------------------------------------------------------------------

_PHRASES = (
    *(
        f"{the}{kind}{noun} is"
        for the in ("the ", "")
        for kind, noun in (("", "answer"), ("correct ", "answer"), ("best ", "answer"), ("correct ", "option"))
    ),
    *("the best option is", "best option is", "the choice is", "choice is", "the correct choice is"),
    *("correct choice is", "i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
# What follows (or stands around) a letter, and how sure it makes one.
_FORMS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))


def find_letter(output: str, letters: Sequence[str]) -> str:
    """lmms-eval's extract_mcq_answer (MMStar, MMBench without a judge): of all letters in some form the one in the
    surest form, and of those the last one; a letter within a word if there is nothing else; "": none."""
    text = output.strip()
    if not text:
        return ""
    for sign in ",.!?;:'\"":
        text = text.strip(sign)
    text = f" {text} "
    found: list[tuple[int, int, str]] = []  # how sure, where, the letter
    for form, sure in _FORMS:
        found += [(sure, text.rfind(form.format(x)), x) for x in letters if form.format(x) in text]
    low = text.lower()
    for phrase in _PHRASES:
        if (start := low.find(phrase)) >= 0:
            places = [(text.find(x, start + len(phrase)), x) for x in letters]
            found += [(7, place, x) for place, x in places if place >= 0]
    bare = text.strip()
    found += [(10, 0, x) for x in letters if bare.startswith(x) and not bare[1:2].isalpha()]
    found += [(9, len(text) - 1, x) for x in letters if bare.endswith(x) and not bare[-2:-1].isalpha()]
    if not found:
        found = [(0, text.rfind(x), x) for x in letters if x in text]
    # Of equal ones the first stays, as Python's reversed sort is stable.
    return max(found, key=lambda entry: entry[:2])[2] if found else ""


# --- MMBench ---------------------------------------------------------------------------------------------------------

_AROUND = (
    *(("", after) for after in (".", ",", ":", ")", ").")),
    *(("(", after) for after in (")", ").")),
    *((":", after) for after in ("", ",", ".", ")", ").")),
)


def mmbench_letter(output: str, choices: Mapping[str, str]) -> str:
    """MMBench's rules before a judge is asked: a letter as a word, else the one choice whose text is in the answer; and
    what lmms-eval's `static` scoring does in the judge's place.

    Args:
      choices: {"A": text, ...} of A to D. A text "nan", as the Parquet files have it, is a choice like others.
    """
    words = output.split()
    if (letter := _word(words, "", "")) and not ("A" in words and len(words) > 3):  # "A" may be an article
        return letter
    for before, after in _AROUND:
        if letter := _word(words, before, after):
            return letter
    low = output.lower()
    texts = [letter for letter, text in choices.items() if str(text).lower() in low]
    return texts[0] if len(texts) == 1 else find_letter(output, sorted(choices))


def _word(words: Sequence[str], before: str, after: str) -> str:
    found = [letter for letter in "ABCDE" if f"{before}{letter}{after}" in words]
    return found[0] if len(found) == 1 else ""
