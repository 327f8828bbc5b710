"""Scenes: drawings on a background, and what can be asked about them.

    one      one thing, of any size and anywhere          name, yes/no, color
    two      two things side by side                      name of one, on which side, yes/no
    several  one to six times the same thing in a grid    count, name, yes/no

Yes/no questions are POPE's: half of the answers are yes, and what is asked about in vain is any thing of the pool
(`random`), one of the tenth that is drawn most often (`popular`), or one of the sub-group of what is there
(`adversarial`).
"""

from __future__ import annotations

import io
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

from PIL import Image

from saisa_jax.data.drawings.packages import Concept
from saisa_jax.data.sample import DataError

KINDS = ("one", "two", "several")
NEGATIVES = ("random", "popular", "adversarial")
BACKGROUNDS = {
    "white": (255, 255, 255),
    "gray": (160, 160, 160),
    "pink": (255, 200, 210),
    "blue": (170, 205, 255),
    "green": (190, 235, 190),
    "yellow": (255, 240, 150),
}
NUMBERS = ("one", "two", "three", "four", "five", "six")


@dataclass(frozen=True)
class Drawing:
    """A concept as one artist drew it."""

    concept: Concept
    style: str

    @property
    def id(self) -> str:
        """STYLE/FILE, for records and for what was never to be seen in training."""
        return f"{self.style}/{self.concept.drawings[self.style].stem}"


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    kind: str  # name | color | count | side | yes/no random | yes/no popular | yes/no adversarial


class Pool:
    """Drawings that scenes are made of; concepts that come first are drawn more often, as the root of their rank."""

    def __init__(self, drawings: Sequence[Drawing]) -> None:
        by_name: dict[str, list[Drawing]] = {}
        for drawing in drawings:
            by_name.setdefault(drawing.concept.name, []).append(drawing)
        self.drawings = list(by_name.values())
        self.concepts = [some[0].concept for some in self.drawings]
        if len(self.concepts) < 3:
            raise DataError(
                f"{len(self.concepts)} concepts are too few for questions with a wrong answer: the packages that "
                "--from names hold too few drawings that all artists have made"
            )
        self._weights = list(accumulate((1 + rank) ** -0.5 for rank in range(len(self.concepts))))
        self.popular = self.concepts[: max(3, len(self.concepts) // 10)]

    def draw(self, rng: random.Random, count: int, even: bool) -> list[Drawing]:
        """Drawings of different concepts; `even`: each concept as likely as any other."""
        chosen: dict[str, Drawing] = {}
        while len(chosen) < count:
            some = rng.choice(self.drawings) if even else rng.choices(self.drawings, cum_weights=self._weights)[0]
            chosen.setdefault(some[0].concept.name, rng.choice(some))
        return list(chosen.values())

    def absent(self, rng: random.Random, how: str, there: Sequence[Concept]) -> Concept:
        """A concept that is not in the picture, chosen as NEGATIVES say."""
        names = {concept.name for concept in there}
        groups = {concept.group for concept in there}
        candidates = {
            "random": self.concepts,
            "popular": self.popular,
            "adversarial": [concept for concept in self.concepts if concept.group in groups],
        }[how]
        left = [concept for concept in candidates if concept.name not in names]
        return rng.choice(left or [concept for concept in self.concepts if concept.name not in names])


@dataclass(frozen=True)
class Scene:
    """What is in a picture. `things` are from left to right; of `several` the one that is there `count` times."""

    kind: str
    background: str
    things: tuple[Drawing, ...]
    count: int
    size: int  # pixels of a side
    places: tuple[tuple[int, int, int], ...]  # of each drawing: left, top, side

    def picture(self) -> Image.Image:
        """RGB, `size` pixels square."""
        canvas = Image.new("RGBA", (self.size, self.size), (*BACKGROUNDS[self.background], 255))
        drawings = self.things * self.count if self.kind == "several" else self.things
        for drawing, (left, top, side) in zip(drawings, self.places, strict=True):
            canvas.alpha_composite(_sprite(drawing.concept.drawings[drawing.style], side), (left, top))
        return canvas.convert("RGB")

    def caption(self) -> str:
        first = self.things[0].concept.name
        if self.kind == "several":
            times = "once" if self.count == 1 else f"{NUMBERS[self.count - 1]} times"
            return f"{article(first)}, {times}, on a {self.background} background"
        if self.kind == "two":
            return f"{article(first)} on the left and {article(self.things[1].concept.name)} on the right"
        return f"{article(first)} on a {self.background} background"

    def ask_name(self, rng: random.Random) -> Question:
        if self.kind != "two":
            return Question("What is this?", self.things[0].concept.name, "name")
        place = rng.randrange(2)
        side = ("left", "right")[place]
        return Question(f"What is on the {side}?", self.things[place].concept.name, "name")

    def ask_yes_no(self, rng: random.Random, pool: Pool, how: str, yes: bool) -> Question:
        there = [thing.concept for thing in self.things]
        asked = rng.choice(there) if yes else pool.absent(rng, how, there)
        verb = "Are" if plural(asked.name) else "Is"
        text = f"{verb} there {article(asked.name)} in the picture?"
        return Question(text, "yes" if yes else "no", f"yes/no {how}")

    def ask_other(self, rng: random.Random) -> Question:
        """The question that only this kind of scene has: color, side or count."""
        if self.kind == "one":
            return self.ask_color()
        if self.kind == "several":
            return Question("How many drawings are there?", str(self.count), "count")
        place = rng.randrange(2)
        name = self.things[place].concept.name
        verb = "are" if plural(name) else "is"
        return Question(f"On which side {verb} the {name}?", ("left", "right")[place], "side")

    def ask_color(self) -> Question:
        return Question("What color is the background?", self.background, "color")


def make_scene(rng: random.Random, pool: Pool, kind: str, size: int, even: bool) -> Scene:
    """A scene of one kind with drawings of the pool, anything else at random."""
    things = tuple(pool.draw(rng, 2 if kind == "two" else 1, even))
    background = rng.choice(list(BACKGROUNDS))
    count = rng.randint(1, len(NUMBERS)) if kind == "several" else 1
    if kind == "one":
        side = rng.randint(size * 3 // 5, size - 4)
        places = [(rng.randint(0, size - side), rng.randint(0, size - side), side)]
    elif kind == "two":
        side = size // 2 - 4
        places = [(left + 2, rng.randint(2, size - side - 2), side) for left in (0, size // 2)]
    else:
        cell = size // 3
        chosen = rng.sample([(x, y) for y in range(3) for x in range(3)], count)
        places = [(x * cell + 2, y * cell + 2, cell - 4) for x, y in chosen]
    return Scene(kind, background, things, count, size, tuple(places))


def conversation(rng: random.Random, scene: Scene, pool: Pool) -> list[Question]:
    """One to three questions for training, of which none gives away the answer to another."""
    telling = [
        lambda: scene.ask_name(rng),
        lambda: scene.ask_yes_no(rng, pool, rng.choice(NEGATIVES), rng.random() < 0.5),
    ]
    questions = []
    if scene.kind == "two":  # where a thing is says that it is there
        telling.append(lambda: scene.ask_other(rng))
    elif scene.kind == "several":
        questions.append(scene.ask_other(rng))
    questions.append(rng.choice(telling)())
    if rng.random() < 1 / 3:
        questions.append(scene.ask_color())
    rng.shuffle(questions)
    return questions


def plural(name: str) -> bool:
    """Whether one says "are there NAME": scissors, french fries."""
    head = re.split(r" (?:with|of|in|on) ", name)[0]
    return re.search(r"([^iosu']|ski)s$", head) is not None


def article(name: str) -> str:
    if plural(name):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _sprite(path: Path, side: int) -> Image.Image:
    """A drawing as large as fits into a square of `side` pixels, in its middle."""
    drawing = _opened(path)
    scale = side / max(drawing.size)
    width, height = (max(1, round(scale * length)) for length in drawing.size)
    square = Image.new("RGBA", (side, side))
    square.paste(drawing.resize((width, height), Image.Resampling.BICUBIC), ((side - width) // 2, (side - height) // 2))
    return square


@lru_cache(maxsize=1024)
def _opened(path: Path) -> Image.Image:
    if path.suffix != ".svg":
        with Image.open(path) as image:
            drawing = image.convert("RGBA")
        drawing.thumbnail((256, 256))  # some photographs are much larger than any picture of the set
        return drawing
    try:
        import resvg_py  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(f"{path} is SVG, which resvg-py draws: pip install -r requirements-proof.txt") from None
    rendered = resvg_py.svg_to_bytes(svg_path=str(path), width=128, height=128)
    return Image.open(io.BytesIO(bytes(rendered))).convert("RGBA")
