"""What a benchmark is: questions about images with their answers, a score of each, and metrics of the whole set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from saisa_jax.config import SourceConfig
from saisa_jax.data.sample import DataError, ImageSource, Turn
from saisa_jax.evaluation.scorers.words import normalise


@dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    Attributes:
      id: its own within the benchmark.
      question: the user's last words; `<image>` in them says where an image stands, else the images stand in front.
      answers: those that are right; a score may weigh them (VQA: ten annotators). (): they lie on a server.
      images: of the whole conversation, in their order.
      kind: what is asked; an accuracy is given for each kind. "": of no kind.
      before: the turns before the question, ending with the assistant's.
      system: the conversation's own system prompt; None: the model's.
      extra: what the score needs besides (choices, a category); it goes into the record of the question.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    images: tuple[ImageSource, ...] = ()
    kind: str = ""
    before: tuple[Turn, ...] = ()
    system: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskData:
    """Where the questions lie.

    Attributes:
      data: `--data`: a file or a folder; "": none was named.
      images: `--images`: what the names of pictures lead into; "": beside `data`.
      validation: the held-out sources of the recipe's stage that made the model.
      stage: that stage.
      prompts: `--prompts`, the school whose words the questions are asked in: one of `SCHOOLS`.
      task: the name that asks; a folder of `data` may have it.
      log: the rows of `--answers`, where a task may find its questions if `data` is not named.
    """

    data: str = ""
    images: str = ""
    validation: tuple[SourceConfig, ...] = ()
    stage: str = ""
    prompts: str = "llava"
    task: str = ""
    log: tuple[Mapping[str, Any], ...] = ()


Row = Mapping[str, Any]  # of TASK.jsonl: the item's fields, and `output`, `prediction`, `score`


def parse(output: str, item: Item) -> str:
    """An answer as it is compared, where a task says nothing else."""
    del item
    return normalise(output)


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
      title: as one writes it.
      items: its questions, in a fixed order. One that cannot be asked is a DataError in its place, or raises one.
      score: of an answer as the model gave it, a number from 0 to 1. It is not called for an item without answers.
      metric: what the mean of the scores is called.
      parse: an answer as it was understood, for the record and for `metrics`.
      rescore: all rows, in order, as they are scored where that depends on the others (MMMU's guesses).
      metrics: further numbers of the whole set, from its scored rows; they need not be means of items.
      headline: the one of them by which the benchmark is quoted; "": the mean of the scores is.
      groups: parts of the questions to report besides the whole: a name, and whether a row belongs to it.
      baseline: accuracies in 0..1 of an answer without the image, on all items: "overall" and one for each group; {}:
        it is not known.
      files: what a server or a judge takes, from all rows, those that could not be asked among them: {end of the name:
        content}, written as `TASK.END` beside the record.
      max_new_tokens: of an answer, where neither --max_new_tokens nor a short answer bounds it; 0: as the recipe says.
      note: who scores the answers where the items have none, and how.
      schools: what differs by the school of prompts besides the items: {"lmms": {"score": ...}}, fields of this
        class. {}: the task is asked in one way alone.
      prompts: the school of this object, as `under` chose it; "": there is one way alone.
    """

    title: str
    items: Callable[[TaskData], Iterable[Item | DataError]]
    score: Callable[[str, Item], float]
    metric: str = "exact match"
    parse: Callable[[str, Item], str] = parse
    rescore: Callable[[Sequence[dict[str, Any]]], Sequence[dict[str, Any]]] = lambda rows: rows
    metrics: Callable[[Sequence[Row]], Mapping[str, float]] = lambda rows: {}
    headline: str = ""
    groups: Mapping[str, Callable[[Row], bool]] = field(default_factory=dict)
    baseline: Callable[[TaskData], Mapping[str, float]] = lambda data: {}
    files: Callable[[Sequence[Row], TaskData], Mapping[str, bytes]] = lambda rows, data: {}
    max_new_tokens: int = 0
    note: str = ""
    schools: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    prompts: str = ""

    def under(self, prompts: str) -> Task:
        """The task as a school asks and scores it."""
        return replace(self, prompts=prompts, **self.schools[prompts]) if self.schools else self


def judged(
    title: str,
    items: Callable[[TaskData], Iterable[Item | DataError]],
    files: Callable[[Sequence[Row], TaskData], Mapping[str, bytes]],
    note: str,
) -> Task:
    """A benchmark of open questions, whose answers are written for the model that scores them."""
    return Task(
        title=title,
        items=items,
        score=lambda output, item: 0.0,
        metric="judge's score",
        parse=lambda output, item: output.strip(),
        files=files,
        max_new_tokens=1024,
        note=note,
        schools={"llava": {}, "lmms": {}},
    )
