"""The set of drawings, made of packages drawn here: the same bytes twice, nothing of the test in training."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from saisa_jax.__main__ import main
from saisa_jax.config import SourceConfig
from saisa_jax.data.drawings import packages, scenes
from saisa_jax.data.drawings.build import PARTS, Sizes, build, make_pools
from saisa_jax.data.drawings.packages import PACKAGES, read_concepts
from saisa_jax.data.images import load_image
from saisa_jax.data.sample import DataError
from saisa_jax.data.sources import open_source
from saisa_jax.evaluation import scoring
from saisa_jax.evaluation.tasks import TASKS, Item, TaskData
from saisa_jax.testing.drawings import COUNT, draw_packages

SIZES = Sizes(captions=30, train=60, validation=6, test=96, image_size=48)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def made(drawn: Path) -> Path:
    output = drawn.parent / f"{drawn.name}-set"
    build(drawn, output, SIZES)
    return output


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((folder / f"{name}.json").read_text())


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_bytes_twice(drawn: Path, made: Path, tmp_path: Path) -> None:
    flags = [f"--{name}={getattr(SIZES, name)}" for name in ("captions", "train", "validation", "test", "image_size")]
    assert main(["data", "drawings", f"--from={drawn}", f"--output={tmp_path / 'again'}", *flags]) == 0
    first = contents(made)
    assert first == contents(tmp_path / "again")
    assert len([name for name in first if name.endswith(".png")]) == 30 + 60 + 2 * 6 + 4 * 8


def test_another_seed_is_another_set(drawn: Path, made: Path, tmp_path: Path) -> None:
    build(drawn, tmp_path / "other", Sizes(captions=3, train=3, validation=1, test=4, image_size=48, seed=1))
    assert records(tmp_path / "other", "train")[0] != records(made, "train")[0]


def test_no_drawing_of_the_test_is_in_training(drawn: Path) -> None:
    """By the files' content, of all drawings that a scene may be made of."""
    pools = make_pools(read_concepts(drawn), seed=0)
    held = {
        name: {
            hashlib.sha256(drawing.concept.drawings[drawing.style].read_bytes()).hexdigest()
            for some in pool.drawings
            for drawing in some
        }
        for name, pool in pools.items()
    }
    assert set(held) == {"train", *PARTS}
    for part in PARTS:
        assert held[part] and not held[part] & held["train"], part
    words = {name: {concept.name for concept in pool.concepts} for name, pool in pools.items()}
    assert not words["concept"] & words["train"]
    assert all(words[part] <= words["train"] for part in PARTS if part != "concept")


def test_fewer_concepts_are_those_with_a_photograph_first(drawn: Path) -> None:
    def names(most: int) -> dict[str, set[str]]:
        pools = make_pools(read_concepts(drawn), 0, most)
        return {part: {concept.name for concept in pool.concepts} for part, pool in pools.items()}

    every, few = names(0), names(30)
    taken = few["train"] | few["concept"]
    assert len(taken) == 30 and taken < every["train"] | every["concept"]
    photographed = {c.name for c in read_concepts(drawn) if "photograph" in c.drawings}
    assert photographed <= taken and few["photograph"] == photographed & few["train"]
    with pytest.raises(DataError, match="--concepts=20 is too few"):
        Sizes(concepts=20)


def test_a_held_out_concept_is_never_named_in_training(drawn: Path, made: Path) -> None:
    held = [concept.name for concept in make_pools(read_concepts(drawn), 0)["concept"].concepts]
    assert len(held) == COUNT // 10
    for name in ("captions", "train", "validation", "captions_validation"):
        said = " ".join(turn["value"] for record in records(made, name) for turn in record["conversations"])
        assert not [concept for concept in held if f"{concept}?" in said or f"{concept} " in f"{said} "], name


def test_questions_are_true_and_balanced(made: Path) -> None:
    test = records(made, "test")
    kinds = Counter(record["kinds"][0] for record in test)
    assert kinds == {
        **{"name": 32, "color": 12, "side": 12, "count": 8},
        **{"yes/no random": 24, "yes/no popular": 8},
    }, "three questions of a picture, in eight pictures of each part"
    said = Counter(record["conversations"][1]["value"] for record in test if record["kinds"][0].startswith("yes/no"))
    assert said["yes"] == 20 and said["no"] == 12
    assert Counter(record["part"] for record in test) == dict.fromkeys(PARTS, 24)
    for record in [*test, *records(made, "train")]:
        turns = [turn["value"] for turn in record["conversations"]]
        answers = dict(zip(record["kinds"], turns[1::2], strict=True))
        assert answers.get("count", "1") in "123456" and answers.get("side", "left") in ("left", "right")
        telling = [kind for kind in record["kinds"] if kind == "name" or kind.startswith("yes/no") or kind == "side"]
        assert len(telling) <= 1, "one answer gives the other away"


def test_answers_of_yes_no_are_what_is_in_the_picture(drawn: Path) -> None:
    pool = make_pools(read_concepts(drawn), 0)["train"]
    for number in range(60):
        rng = random.Random(number)
        scene = scenes.make_scene(rng, pool, scenes.KINDS[number % 3], 48, even=number % 2 == 0)
        there = [thing.concept for thing in scene.things]
        for how in scenes.NEGATIVES:
            no = pool.absent(rng, how, there)
            assert no not in there
            assert how != "popular" or no in pool.popular
            assert how != "adversarial" or no.group in {concept.group for concept in there}
            yes = scene.ask_yes_no(rng, pool, how, yes=True)
            assert any(concept.name in yes.text for concept in there) and yes.answer == "yes"


@pytest.mark.parametrize(
    ("name", "said"),
    [("scissors", "scissors"), ("octopus", "an octopus"), ("nest with eggs", "a nest with eggs"), ("skis", "skis")],
)
def test_article(name: str, said: str) -> None:
    assert scenes.article(name) == said


def test_sources_and_the_benchmark_read_it(made: Path) -> None:
    for name, length in (("captions", 30), ("train", 60), ("test", 96)):
        source = open_source(SourceConfig("llava", str(made / f"{name}.json"), images=str(made / "images")))
        assert len(source) == length
        assert load_image(source[0].images[0], source[0].id).size == (48, 48)
    task = TASKS["drawings"]
    data = TaskData(str(made))
    asked = [item for item in task.items(data) if isinstance(item, Item)]
    assert len(asked) == 96 and len({item.images for item in asked}) == 32
    rows = [scoring.question(item) | scoring.answered(task, item, item.answers[0]) for item in asked]
    record = scoring.summary("drawings", task, rows, data)
    assert record["accuracy"] == 1 and list(record["groups"]) == list(PARTS)
    assert set(record["baseline"]) == {"overall", *PARTS} and 0 < record["baseline"]["overall"] < 0.7


def test_licences_name_every_artist(made: Path) -> None:
    text = (made / "LICENSES.md").read_text()
    assert all(package.licence in text and package.url in text for package in PACKAGES)


def test_what_is_there_stays(drawn: Path, made: Path, tmp_path: Path) -> None:
    before = (made / "set.json").stat().st_mtime_ns
    assert build(drawn, made, SIZES)["samples"]["train"] == 60
    assert (made / "set.json").stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"holds a set of .*name another --output"):
        build(drawn, made, Sizes())
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match=r"has no set\.json"):
        build(drawn, tmp_path / "mine", SIZES)


def test_without_photographs(tmp_path: Path) -> None:
    root = draw_packages(tmp_path / "packages", photographs=False)
    with pytest.raises(DataError, match=r"apt-get download tuxpaint.*--nophotographs"):
        build(root, tmp_path / "set", SIZES)
    small = Sizes(captions=3, train=3, validation=1, test=6, image_size=48, photographs=False)
    build(root, tmp_path / "set", small)
    assert {record["part"] for record in records(tmp_path / "set", "test")} == set(PARTS[:3])
    assert "Tux Paint stamps" not in (tmp_path / "set" / "LICENSES.md").read_text()


@pytest.mark.parametrize("package", [p.folder for p in PACKAGES])
def test_a_missing_package_is_named_with_its_command(package: str, tmp_path: Path) -> None:
    root = draw_packages(tmp_path)
    shutil.rmtree(root / package)
    (fetch,) = (p.fetch for p in packages.PACKAGES if p.folder == package)
    with pytest.raises(DataError) as error:
        read_concepts(root)
    assert fetch in str(error.value) and "make proof-packages" in str(error.value)


def test_the_task_needs_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--data=DIR"):
        list(TASKS["drawings"].items(TaskData()))
    with pytest.raises(DataError, match=r"has no set\.json"):
        list(TASKS["drawings"].items(TaskData(str(tmp_path))))
