"""Your own questions: a source of training data, the last answer of each conversation being the right one.

    python eval.py --workdir=runs/mine --tasks=source                              the recipe's validation sources
    python eval.py --workdir=runs/mine --tasks=source --data=test.json --images=pictures

`--data` is a .json or .jsonl file in LLaVA's form or of chat messages, or a folder that `data prepare` wrote.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from etils import epath

from saisa_jax.config import ConfigError, SourceConfig
from saisa_jax.data.features import held_by
from saisa_jax.data.sample import ASSISTANT, USER, DataError, Sample
from saisa_jax.data.sources import open_source
from saisa_jax.data.sources.json_records import JsonRecords
from saisa_jax.data.text.conversation import IMAGE
from saisa_jax.evaluation.scorers.vqa import vqa_score
from saisa_jax.evaluation.scorers.words import exact_match
from saisa_jax.evaluation.tasks import TASKS
from saisa_jax.evaluation.tasks.task import Item, Row, Task, TaskData


def items(data: TaskData) -> Iterator[Item | DataError]:
    """The questions of all sources, one after the other.

    Where the turns of a sample are independent (easy-VQA's), each is a question of its own; else the last answer is the
    right one, and what was said before it is the prompt.

    Raises:
      ConfigError: there is no source.
      DataError: a source that cannot be opened.
    """
    seen: dict[str, int] = {}
    for config in _sources(data):
        samples = open_source(config)
        if held_by(samples):
            raise DataError(f"source {config} holds features in place of images, and a question needs the image")
        for number in range(len(samples)):
            try:
                for item in _items(samples[number]):
                    # Ids may stand twice in a file, and in two sources.
                    count = seen[item.id] = seen.get(item.id, 0) + 1
                    yield item if count == 1 else dataclasses.replace(item, id=f"{item.id} ({count})")
            except DataError as error:
                yield error


def _sources(data: TaskData) -> tuple[SourceConfig, ...]:
    if data.data:
        return (SourceConfig(_format(data.data), data.data, images=data.images),)
    if not data.validation:
        raise ConfigError(
            f"the task source has nothing to ask: the recipe's {data.stage}.validation is empty; name a file of "
            "samples with --data=FILE (.json, .jsonl, or a folder of `data prepare`), and the folder of their pictures "
            "with --images=FOLDER"
        )
    return data.validation


def _format(path: str) -> str:
    """The `sources.format` of a file or folder, as its first sample says."""
    if epath.Path(path).is_dir():
        return "arrayrecord"
    if not Path(path).exists():
        raise DataError(f"--data={path}: there is no such file or folder")
    records = JsonRecords(path)
    first = records[0] if len(records) else {}
    return "chat" if isinstance(first, dict) and "messages" in first else "llava"


def _items(sample: Sample) -> Iterator[Item]:
    turns = sample.turns
    last = max((number for number, turn in enumerate(turns) if turn.role == ASSISTANT), default=0)
    if last == 0:
        raise DataError("no answer to compare with: the sample has no turn of the assistant", sample.id)
    if sample.independent_turns and last > 1 and turns[0].text.count(IMAGE) == 0:
        pairs = [turns[n : n + 2] for n in range(0, last, 2)]
        for number, (asked, answered) in enumerate(pairs):
            yield Item(f"{sample.id}/{number}", asked.text, (answered.text,), sample.images, kind_of(answered.text))
        return
    question, answer = turns[last - 1], turns[last].text
    assert question.role == USER
    yield Item(
        sample.id, question.text, (answer,), sample.images, kind_of(answer), turns[: last - 1], sample.system
    )  # fmt: skip


def kind_of(answer: str) -> str:
    """VQAv2's kinds of answers: yes/no, number, other."""
    word = answer.strip().lower().rstrip(".")
    return "yes/no" if word in ("yes", "no") else "number" if word.replace(".", "", 1).isdigit() else "other"


def score(output: str, item: Item) -> float:
    return exact_match(output, item.answers)


def metrics(rows: Sequence[Row]) -> dict[str, float]:
    """The VQA score, which forgives articles, punctuation and numbers in words."""
    return {"vqa_score": sum(vqa_score(row["output"], row["answers"]) for row in rows) / len(rows)}


TASKS.register("source")(Task(title="the held-out data", items=items, score=score, metrics=metrics))
