"""Scores of answers, and how sure one can be of them."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

Z_95 = 1.959963984540054  # two-sided 95% of a normal distribution


def normalise(text: str) -> str:
    """An answer as it is compared: without outer white space, in lower case, without final full stops."""
    return text.strip().lower().rstrip(".").rstrip()


def exact_match(output: str, answers: Sequence[str]) -> float:
    """1 if an output is one of the right answers, both normalised; else 0."""
    return float(normalise(output) in map(normalise, answers))


def vqa_score(output: str, answers: Sequence[str]) -> float:
    """The soft score of VQA (Antol et al., 2015; VQAv2, TextVQA, VizWiz), from 0 to 1.

    Of n annotators' answers each is left out in turn, and the output is right if 3 of the others gave it; with fewer
    than 4 answers, if all others did. It is the mean over the left-out ones: with 10 answers min(1, 0.3 m) for m equal
    ones (m < 4). One answer alone is matched. Outputs and answers are compared as `vqa_words` writes them.
    """
    said, given = vqa_words(output), [vqa_words(answer) for answer in answers]
    if len(given) == 1:
        return float(said == given[0])
    enough = min(3, len(given) - 1)
    matches = given.count(said)
    return sum(min(1.0, (matches - (answer == said)) / enough) for answer in given) / len(given)


def vqa_words(text: str) -> str:
    """An answer as VQA's evaluation compares it: small letters, digits for number words, no articles, no punctuation
    but within numbers, apostrophes where contractions have them."""
    given = text = " ".join(text.split()).lower()
    number = re.search(r"\d,\d", given)
    for sign in _PUNCTUATION:
        alone = number or f" {sign}" in given or f"{sign} " in given
        text = text.replace(sign, "" if alone else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [_DIGITS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


_PUNCTUATION = """;/[]"{}()=+\\_->@`<,?!"""
_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS.split())} | {"none": "0"}
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll let's ma'am mightn't mightn't've might've mustn't
    must've needn't not've o'clock oughtn't shan't she'd've shouldn't should've shouldn't've somebody'd someone'd
    someone'll someone's something'd something'll that'd that'd've that's there'd there'd've there're there's they'd
    they'd've they'll they're they've wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all you'd
    you'd've you'll you're you've
"""
# "dont" is "don't", and of "couldn't've" either apostrophe may be missing.
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, letter in enumerate(word)
    if letter == "'"
}


class Interval(NamedTuple):
    """A 95% confidence interval of an accuracy in 0..1."""

    low: float
    high: float


def wilson(hits: float, n: float, z: float = Z_95) -> Interval:
    """Wilson's score interval of `hits` right answers to `n` independent questions; neither needs to be whole.

    Raises:
      ValueError: no questions, or more hits than questions.
    """
    if n <= 0 or not 0 <= hits <= n:
        raise ValueError(f"{hits} right answers to {n} questions have no interval")
    share, spread = hits / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def effective_size(scores: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """How many independent questions these are worth: n divided by the design effect.

    Questions about one image are right or wrong together: an image that is seen wrongly costs all of them. The design
    effect is the variance of the mean as it is between clusters over that of independent questions,

        deff = G/(G-1) sum_g (hits_g - p n_g)^2 / (n p (1-p)),    G clusters of n_g questions, p the mean,

    and no less than 1. Scores between 0 and 1 vary less than such answers, so that the size is then rather too small.
    Where every answer is right, or every one wrong, it cannot be estimated; then a cluster counts
    as one question, the least that it can be worth.

    Args:
      scores: of each question, from 0 to 1.
      clusters: what each question shares with others, such as its image.
    """
    n = len(scores)
    if n == 0 or n != len(clusters):
        raise ValueError(f"{n} answers came with {len(clusters)} clusters")
    answers: dict[Hashable, list[float]] = defaultdict(list)
    for score, cluster in zip(scores, clusters, strict=True):
        answers[cluster].append(score)
    share = sum(scores) / n
    if share in (0.0, 1.0) or len(answers) == 1:
        return float(len(answers))
    between = sum((sum(group) - share * len(group)) ** 2 for group in answers.values())
    deff = len(answers) / (len(answers) - 1) * between / (n * share * (1 - share))
    return n / max(1.0, deff)


def clustered_interval(scores: Sequence[float], clusters: Sequence[Hashable]) -> Interval:
    """Wilson's interval with the effective number of questions; arguments as in `effective_size`.

    It needs no random numbers, stays inside 0..1, and does not shrink to a point at 0% or 100% as a bootstrap does.
    """
    size = effective_size(scores, clusters)
    return wilson(sum(scores) / len(scores) * size, size)
