"""Writes the set: captions, conversations and test questions, with nothing of the test's drawings in training.

    captions.json captions_validation.json    stage 1: a caption of each picture
    train.json validation.json                stage 2: conversations of one to three questions
    test.json                                 test questions, equally many of four parts
    set.json                                  settings, counts, and what can be answered without the pictures
    images/SPLIT/00000.png ...  LICENSES.md

The JSON files are LLaVA's form. The parts of the test, by what training has never shown:

    drawing       a drawing of a known thing by a known artist
    artist        all drawings of one artist (Twemoji)
    concept       a thing, by anybody: neither its drawings nor its name
    photograph    photographs of known things
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from saisa_jax.data.drawings.packages import PACKAGES, PHOTOGRAPH, Concept, licences, read_concepts
from saisa_jax.data.drawings.scenes import (
    KINDS,
    NEGATIVES,
    Drawing,
    Pool,
    Question,
    Scene,
    conversation,
    make_scene,
)
from saisa_jax.data.sample import DataError

PARTS = ("drawing", "artist", "concept", PHOTOGRAPH)
ARTISTS = ("noto", "fluent", "openmoji")  # of the training set
HELD_OUT_ARTIST = "twemoji"
HELD_OUT_CONCEPTS = 10  # one of so many concepts
HELD_OUT_DRAWINGS = 5  # of one of so many known concepts one artist's drawing
SET = "set.json"


@dataclass(frozen=True)
class Sizes:
    """How many of what, and how large.

    Attributes:
      captions, train, validation: samples (pictures) of stage 1, of stage 2, and of each one's held-out set.
      test: questions.
      image_size: pixels of a side.
      concepts: things at most, those with a photograph first; 0: all. Fewer are shown more often, and learned sooner.
      seed: of the choice of everything.
      photographs: whether the test has some.
    """

    captions: int = 8000
    train: int = 12000
    validation: int = 256
    test: int = 2000
    image_size: int = 112
    concepts: int = 0
    seed: int = 0
    photographs: bool = True

    def __post_init__(self) -> None:
        for name in ("captions", "train", "validation", "test"):
            if getattr(self, name) < 1:
                raise DataError(f"--{name}={getattr(self, name)} must be at least 1")
        if self.concepts and self.concepts < 3 * HELD_OUT_CONCEPTS:
            raise DataError(
                f"--concepts={self.concepts} is too few, since one of {HELD_OUT_CONCEPTS} is held out: at least "
                f"{3 * HELD_OUT_CONCEPTS}, or 0 for all"
            )
        if self.image_size < 32:
            raise DataError(f"--image_size={self.image_size} is too small to draw nine things in: at least 32")


def build(root: Path, output: Path, sizes: Sizes) -> dict[str, Any]:
    """Makes the set, or leaves it if it is there with the same settings.

    Args:
      root: the unpacked packages.
      output: a directory; it is there when the set is whole.
      sizes: of the set.

    Returns:
      what is in set.json.

    Raises:
      DataError: a package is missing, or `output` holds something else.
    """
    settings = dataclasses.asdict(sizes)
    if output.exists():
        there = read_set(output)
        if there["settings"] != settings:
            other = {name: there["settings"].get(name) for name, value in settings.items()}
            raise DataError(f"{output} holds a set of {other}, not of {settings}: name another --output, or delete it")
        return there
    concepts = read_concepts(root, sizes.photographs)
    pools = make_pools(concepts, sizes.seed, sizes.concepts)
    unfinished = output.with_name(f"{output.name}.unfinished")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    splits = {name: list(split(name, pools, sizes)) for name in (*_training(sizes), "test")}
    for name, samples in splits.items():
        _write(unfinished, name, samples)
    packages = tuple(package for package in PACKAGES if sizes.photographs or package.style != PHOTOGRAPH)
    (unfinished / "LICENSES.md").write_text(licences(packages), encoding="utf-8")
    record = {
        "settings": settings,
        "concepts": {name: len(pool.concepts) for name, pool in pools.items()},
        "samples": {name: len(samples) for name, samples in splits.items()},
        "questions": {name: _counts(samples) for name, samples in splits.items() if "captions" not in name},
        "baseline": blind_baseline(splits["train"], splits["test"]),
    }
    (unfinished / SET).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    unfinished.rename(output)
    return record


def read_set(folder: Path) -> dict[str, Any]:
    """What set.json says.

    Raises:
      DataError: `folder` is no set.
    """
    try:
        return json.loads((folder / SET).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{folder} has no {SET}, so it is no set of drawings: python -m saisa_jax data drawings --from=PACKAGES "
            f"--output={folder} makes one where nothing is yet"
        ) from None
    except ValueError as error:
        raise DataError(f"{folder / SET} is not JSON: {error}") from error


def make_pools(concepts: Sequence[Concept], seed: int, most: int = 0) -> dict[str, Pool]:
    """Which drawings are for training (`train`), and which for each part of the test; no two pools share a drawing.

    Args:
      concepts: all that there are.
      seed: of the choice.
      most: concepts at most, those with a photograph first; 0: all.
    """

    def place(text: str) -> str:
        return hashlib.sha256(f"{seed}/{text}".encode()).hexdigest()

    ordered = sorted(concepts, key=lambda concept: place(concept.name))
    if most:
        chosen = sorted(ordered, key=lambda concept: PHOTOGRAPH not in concept.drawings)[:most]
        ordered = [concept for concept in ordered if concept in chosen]
    held, known = ordered[::HELD_OUT_CONCEPTS], [c for n, c in enumerate(ordered) if n % HELD_OUT_CONCEPTS]
    kept = {concept.name: min(ARTISTS, key=lambda a, c=concept: place(f"{c.name}/{a}")) for concept in known}
    kept = {name: artist for n, (name, artist) in enumerate(kept.items()) if n % HELD_OUT_DRAWINGS == 0}
    drawings = {
        "train": [Drawing(c, artist) for c in known for artist in ARTISTS if artist != kept.get(c.name)],
        "drawing": [Drawing(c, kept[c.name]) for c in known if c.name in kept],
        "artist": [Drawing(c, HELD_OUT_ARTIST) for c in known],
        "concept": [Drawing(c, artist) for c in held for artist in ARTISTS],
        PHOTOGRAPH: [Drawing(c, PHOTOGRAPH) for c in known if PHOTOGRAPH in c.drawings],
    }
    return {name: Pool(some) for name, some in drawings.items() if some or name != PHOTOGRAPH}


@dataclass(frozen=True)
class Sample:
    """A picture with a caption (one turn without a question), a conversation, or one question of the test."""

    id: str
    image: str  # in images/
    scene: Scene
    questions: tuple[Question, ...]
    part: str = ""  # of the test

    def record(self) -> dict[str, Any]:
        turns = []
        for number, question in enumerate(self.questions):
            image = "<image>\n" if number == 0 else ""
            turns += [{"from": "human", "value": f"{image}{question.text}"}, {"from": "gpt", "value": question.answer}]
        said = {"id": self.id, "image": self.image, "conversations": turns}
        said |= {"kinds": [question.kind for question in self.questions]}
        said |= {"drawings": [drawing.id for drawing in self.scene.things]}
        return said | ({"part": self.part} if self.part else {})


def _training(sizes: Sizes) -> dict[str, int]:
    return {
        "captions": sizes.captions,
        "captions_validation": sizes.validation,
        "train": sizes.train,
        "validation": sizes.validation,
    }


def split(name: str, pools: Mapping[str, Pool], sizes: Sizes) -> Iterator[Sample]:
    """The samples of one JSON file. Sample n depends on seed, split and n alone, so that more of them begin alike."""
    if name == "test":
        yield from _test(pools, sizes)
        return
    pool = pools["train"]
    for number in range(_training(sizes)[name]):
        rng = random.Random(f"{sizes.seed}/{name}/{number}")
        scene = make_scene(rng, pool, KINDS[number % len(KINDS)], sizes.image_size, even=False)
        if "captions" in name:
            questions = [Question("Describe the picture.", scene.caption(), "caption")]
        else:
            questions = conversation(rng, scene, pool)
        image = f"{name}/{number:05}.png"
        yield Sample(f"drawings/{name}/{number}", image, scene, tuple(questions))


def _test(pools: Mapping[str, Pool], sizes: Sizes) -> Iterator[Sample]:
    """Equally many questions of each part, three of a picture: its name, yes/no, and what its kind of scene has."""
    parts = [part for part in PARTS if part in pools]
    for place, part in enumerate(parts):
        share = sizes.test * (place + 1) // len(parts) - sizes.test * place // len(parts)
        yield from islice(_test_part(part, pools[part], sizes), share)


def _test_part(part: str, pool: Pool, sizes: Sizes) -> Iterator[Sample]:
    number = 0
    while True:
        rng = random.Random(f"{sizes.seed}/test/{part}/{number}")
        scene = make_scene(rng, pool, KINDS[number % len(KINDS)], sizes.image_size, even=True)
        turn = number // len(KINDS)  # so that each kind of scene has every sort of yes/no question equally often
        how = NEGATIVES[turn // 2 % len(NEGATIVES)]
        asked = (scene.ask_name(rng), scene.ask_yes_no(rng, pool, how, turn % 2 == 0), scene.ask_other(rng))
        for place, question in enumerate(asked):
            name = f"test/{part}_{number:05}.png"
            yield Sample(f"drawings/test/{part}/{number}/{place}", name, scene, (question,), part)
        number += 1


def _write(folder: Path, name: str, samples: Sequence[Sample]) -> None:
    (folder / "images" / name).mkdir(parents=True)
    for sample in samples:
        path = folder / "images" / sample.image
        if not path.exists():  # the questions of the test share theirs
            sample.scene.picture().save(path)
    rows = ",\n".join(json.dumps(sample.record(), ensure_ascii=False) for sample in samples)
    (folder / f"{name}.json").write_text(f"[\n{rows}\n]\n", encoding="utf-8")


def _counts(samples: Sequence[Sample]) -> dict[str, int]:
    return dict(sorted(Counter(question.kind for sample in samples for question in sample.questions).items()))


def blind_baseline(train: Sequence[Sample], test: Sequence[Sample]) -> dict[str, float]:
    """Accuracy of the most frequent answer to each question in training, without the picture: overall and by part.

    A question that training never asks gets the most frequent answer of its kind; of equals the first that occurs.
    """
    asked: dict[str, Counter[str]] = defaultdict(Counter)
    for question in (question for sample in train for question in sample.questions):
        asked[question.text][question.answer] += 1
        asked[f"kind {question.kind}"][question.answer] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for sample in test:
        (question,) = sample.questions
        known = asked[question.text] or asked[f"kind {question.kind}"]
        hit = bool(known) and known.most_common(1)[0][0] == question.answer
        for group in ("overall", sample.part):
            right[group].append(hit)
    return {group: sum(hits) / len(hits) for group, hits in right.items()}
