"""easy-VQA: the 9,673 questions about the 1,000 test images, answered freely and compared exactly."""

from __future__ import annotations

import dataclasses

from saisa_jax.data.sources import easy_vqa
from saisa_jax.evaluation.metrics import exact_match
from saisa_jax.evaluation.tasks.task import Item, Task


def items() -> list[Item]:
    """All test questions in the package's order; 74% of them want a yes or a no."""
    return [
        Item(f"easy_vqa/test/{q.id}", (q.image_path,), q.question, q.answer, q.kind) for q in easy_vqa.questions("test")
    ]


def baseline() -> dict[str, float]:
    """Each question's most frequent answer in training, which needs no image: 67% in all, 23% beyond yes and no."""
    return dataclasses.asdict(easy_vqa.majority_baseline())


TASK = Task(
    name="easy_vqa",
    title="easy-VQA",
    items=items,
    score=exact_match,
    groups={"yes_no": easy_vqa.is_yes_no, "other": lambda kind: not easy_vqa.is_yes_no(kind)},
    baseline=baseline,
)
