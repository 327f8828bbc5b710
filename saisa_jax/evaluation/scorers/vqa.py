"""The soft score of VQA, and its words: EvalAI's processor of answers, as in Pythia, LLaVA and lmms-eval."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence


def vqa_words(text: str) -> str:
    """An answer as EvalAI's processor writes it: small letters, digits for number words, no articles, no punctuation
    but within numbers, a genitive's 's as a word, apostrophes where some contractions have them."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return vqav2_words(text)


def vqav2_words(text: str) -> str:
    """The same without its first step, as lmms-eval does for VQAv2: "dog's" stays, and so may a comma's space."""
    text = text.strip().replace("\n", " ").replace("\t", " ").strip()
    given, number = text, _COMMA.search(text)
    for sign in _PUNCTUATION:
        alone = number or f" {sign}" in given or f"{sign} " in given
        text = text.replace(sign, "" if alone else " ")
    # At most 32: the published code hands re.UNICODE over as the count.
    text = _PERIOD.sub("", text, count=32)
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_score(output: str, answers: Sequence[str], words: Callable[[str], str] = vqa_words) -> float:
    """The soft score of VQA (Antol et al., 2015; VQAv2, TextVQA, VizWiz), from 0 to 1.

    Of n annotators' answers each is left out in turn, and the output is right if 3 of the others gave it; with fewer
    than 4 answers, if all others did. It is the mean over the left-out ones: with 10 answers min(1, 0.3 m) for m equal
    ones (m < 4). One answer alone is matched. Outputs and answers are compared as `words` writes them.
    """
    said, given = words(output), [words(answer) for answer in answers]
    if len(given) == 1:
        return float(said == given[0])
    enough = min(3, len(given) - 1)
    matches = given.count(said)
    return sum(min(1.0, (matches - (answer == said)) / enough) for answer in given) / len(given)


_PUNCTUATION = """;/[]"{}()=+\\_-><@`,?!"""
_COMMA = re.compile(r"(?<=\d),+(?=\d)")
_PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")  # sic: the first part looks ahead, so that "5." loses its stop
_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS.split())} | {"none": "0"}
# Of these words one apostrophe may be missing: "dont" is "don't", "couldnt've" and "couldn'tve" are "couldn't've".
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# "i'm" and "i've" stand in the published table with a capital, which no small word equals.
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
