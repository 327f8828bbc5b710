"""easy-VQA: the 9,673 questions about the 1,000 test images, answered freely and compared exactly."""

from __future__ import annotations

import dataclasses

from saisa_jax.config import ConfigError
from saisa_jax.data.sources import easy_vqa
from saisa_jax.evaluation.scorers.words import exact_match
from saisa_jax.evaluation.tasks import TASKS
from saisa_jax.evaluation.tasks.task import Item, Row, Task, TaskData


def items(data: TaskData) -> list[Item]:
    """All test questions in the package's order; 74% of them want a yes or a no.

    Raises:
      ConfigError: another place is named.
    """
    if data.data:
        raise ConfigError(
            f"--data={data.data}: easy_vqa asks the questions of the package easy-vqa and no others; leave --data out, "
            "or evaluate a file of your own with --tasks=source"
        )
    return [
        Item(f"easy_vqa/test/{q.id}", q.question, (q.answer,), (q.image_path,), q.kind)
        for q in easy_vqa.questions("test")
    ]


def score(output: str, item: Item) -> float:
    return exact_match(output, item.answers)


def is_yes_no(row: Row) -> bool:
    return easy_vqa.is_yes_no(row["kind"])


def baseline(data: TaskData) -> dict[str, float]:
    """Each question's most frequent answer in training, which needs no image: 67% in all, 23% beyond yes and no."""
    del data
    return dataclasses.asdict(easy_vqa.majority_baseline())


TASKS.register("easy_vqa")(
    Task(
        title="easy-VQA",
        items=items,
        score=score,
        groups={"yes_no": is_yes_no, "other": lambda row: not is_yes_no(row)},
        baseline=baseline,
    )
)
