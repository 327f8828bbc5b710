"""The set of `data drawings`: freely answered questions about drawings, compared exactly.

    python eval.py --workdir=runs/proof/saisa --tasks=drawings --data=runs/proof/drawings

Accuracies are by kind of question, and by what training has never shown: a drawing, an artist, a thing, or any
photograph at all (`data/drawings/build.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from saisa_jax.config import ConfigError
from saisa_jax.data.drawings.build import PARTS, read_set
from saisa_jax.data.sources.archives import open_images
from saisa_jax.data.sources.json_records import JsonRecords
from saisa_jax.evaluation.scorers.words import exact_match
from saisa_jax.evaluation.tasks import TASKS
from saisa_jax.evaluation.tasks.task import Item, Row, Task, TaskData


def folder(data: TaskData) -> Path:
    """Where the set lies.

    Raises:
      ConfigError: no folder was named.
    """
    if not data.data:
        raise ConfigError(
            "the task drawings asks the questions of a set: name its folder with --data=DIR; python -m saisa_jax data "
            "drawings --from=PACKAGES --output=DIR makes one"
        )
    return Path(data.data)


def items(data: TaskData) -> Iterator[Item]:
    """The test questions in their order, a part after the other.

    Raises:
      ConfigError, DataError: there is no set.
    """
    where = folder(data)
    read_set(where)
    records = JsonRecords(str(where / "test.json"))
    images = open_images(data.images or where / "images")
    for number in range(len(records)):
        record = records[number]
        asked, answered = record["conversations"]
        yield Item(
            record["id"],
            asked["value"].removeprefix("<image>\n"),
            (answered["value"],),
            (images.find(record["image"], record["id"]),),
            record["kinds"][0],
            extra={"part": record["part"], "drawings": record["drawings"]},
        )


def score(output: str, item: Item) -> float:
    return exact_match(output, item.answers)


def of_part(part: str) -> Callable[[Row], bool]:
    return lambda row: row["extra"]["part"] == part


def baseline(data: TaskData) -> Mapping[str, float]:
    """The most frequent answer to each question in training, which needs no picture."""
    return read_set(folder(data))["baseline"]


TASKS.register("drawings")(
    Task(
        title="drawings",
        items=items,
        score=score,
        groups={part: of_part(part) for part in PARTS},
        baseline=baseline,
        max_new_tokens=12,
    )
)
