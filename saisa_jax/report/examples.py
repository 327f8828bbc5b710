"""Which questions the page shows: a deterministic choice of mixed kinds, with some wrong answers among them."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

Prediction = dict[str, Any]
Row = TypeVar("Row", bound=Mapping[str, Any])


def is_right(row: Mapping[str, Any]) -> bool:
    """Whether an answer is right, or by a soft score (VQA) more right than wrong."""
    return row["score"] >= 0.5


def choose(predictions: Sequence[Prediction], count: int = 12, wrong: int = 3) -> list[Prediction]:
    """`count` predictions about different images, kinds in turn; `wrong` of them wrong ones, if there are as many."""
    mixed = shuffled(predictions)
    seen: set[str | None] = set()
    bad = _in_turn([row for row in mixed if not is_right(row)], wrong, seen)
    good = _in_turn([row for row in mixed if is_right(row)], count - len(bad), seen)
    more = _in_turn([row for row in mixed if not is_right(row)], count - len(bad) - len(good), seen)
    return shuffled([*bad, *good, *more])


def choose_for_attention(shown: Sequence[Prediction], count: int = 3) -> list[Prediction]:
    """Those of the shown questions whose attention is drawn: of different kinds, right ones first, and yes/no last."""

    def rank(row: Prediction) -> tuple[bool, bool]:
        return not is_right(row), row["answers"][0] in ("yes", "no")

    ranked = sorted((row for row in shown if row["image"]), key=rank)
    kinds: set[str] = set()
    first = [row for row in ranked if not (row["kind"] in kinds or kinds.add(row["kind"]))]
    rest = [row for row in ranked if row not in first]
    return [*first, *rest][:count]


def shuffled(rows: Iterable[Row]) -> list[Row]:
    """In an order that looks random and is the same everywhere."""
    return sorted(rows, key=lambda row: hashlib.sha256(str(row["id"]).encode()).hexdigest())


def _in_turn(rows: Iterable[Prediction], count: int, seen: set[str | None]) -> list[Prediction]:
    """The first `count` rows, one kind after the other, none about an image in `seen`, to which theirs are added."""
    kinds: dict[str, list[Prediction]] = defaultdict(list)
    for row in rows:
        kinds[row["kind"]].append(row)
    queues = [kinds[kind] for kind in sorted(kinds)]
    chosen: list[Prediction] = []
    while len(chosen) < count and any(queues):
        for queue in queues:
            while queue and queue[0]["image"] in seen:
                queue.pop(0)
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
                seen.add(chosen[-1]["image"])
    return chosen
