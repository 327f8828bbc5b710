"""`eval.py --compare A B`: whether B is better than A on the same questions, and which answers changed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from absl import logging
from etils import epath
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from saisa_jax.evaluation import metrics
from saisa_jax.evaluation.paired import Difference, mcnemar, paired_difference
from saisa_jax.evaluation.results import Result, ResultError, cluster, find_results, read_result

SHOWN = 5  # changed answers of each direction in the terminal
# What two evaluations may differ in without being incomparable; each difference is told. (key of the record, its name)
TOLD = (
    "settings.data",
    "settings.images",
    "settings.limit",
    "decoding",
    "settings.quantize",
    "versions",
)
SAME = ("prompts", "metric")  # where these differ, the scores do not say the same


@dataclass(frozen=True)
class Change:
    """A question whose score differs."""

    id: str
    question: str
    answers: Sequence[str]
    outputs: tuple[str, str]
    scores: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of one task.

    Attributes:
      task: its name.
      names: of the two, as they are shown.
      n: questions that both were scored on.
      scores: the mean scores of these.
      intervals: their 95% intervals, each for itself.
      difference: the second less the first, paired.
      worse, better: the questions whose score fell and rose, in the order of the first evaluation.
      p_value: of McNemar's exact test; None where scores are not all 0 or 1.
      metrics: further numbers of both, which are of all of their questions.
      notes: in what else the two differ.
    """

    task: str
    names: tuple[str, str]
    n: int
    scores: tuple[float, float]
    intervals: tuple[metrics.Interval, metrics.Interval]
    difference: Difference
    worse: tuple[Change, ...]
    better: tuple[Change, ...]
    p_value: float | None
    metrics: Mapping[str, tuple[float, float]]
    notes: tuple[str, ...]


def compare_places(a: str, b: str) -> list[Comparison]:
    """Compares two TASK.json files, or every task that two output folders have in common.

    Raises:
      ResultError: results that are not there, not whole or not comparable, or no task in common.
    """
    here, there = find_results(a), find_results(b)
    if len(here) == len(there) == 1 and here.keys() != there.keys():  # files may have been renamed
        return [compare(read_result(*here.values()), read_result(*there.values()))]
    common = [name for name in here if name in there]
    if not common:
        raise ResultError(f"no task in common: {a} holds {', '.join(here)}, and {b} {', '.join(there)}")
    for place, found in ((a, here), (b, there)):
        if alone := [name for name in found if name not in common]:
            logging.warning("only %s holds %s", place, ", ".join(alone))
    return [compare(read_result(here[name]), read_result(there[name])) for name in common]


def compare(a: Result, b: Result) -> Comparison:
    """Compares two evaluations on the questions that both were scored on.

    Raises:
      ResultError: of two tasks, two schools of prompts, two metrics, other questions under the same ids, or none in
        common.
    """
    _check_comparable(a, b)
    both = [name for name, row in a.rows.items() if name in b.rows and None not in (row["score"], _score(b, name))]
    if not both:
        notes = dict.fromkeys(note for result in (a, b) if (note := result.record.get("note")))
        raise ResultError(
            f"{a.path} and {b.path} have no scored question in common{': ' * bool(notes)}{'; '.join(notes)}"
        )
    rows = [(a.rows[name], b.rows[name]) for name in both]
    first, second = ([float(row["score"]) for row in side] for side in zip(*rows, strict=True))
    clusters = [cluster(row) for row, _ in rows]
    changes = [_change(*pair) for pair in rows if pair[0]["score"] != pair[1]["score"]]
    worse = tuple(change for change in changes if change.scores[0] > change.scores[1])
    better = tuple(change for change in changes if change.scores[0] < change.scores[1])
    whole = {*first, *second} <= {0.0, 1.0}
    of_a, of_b = a.record.get("metrics", {}), b.record.get("metrics", {})
    return Comparison(
        a.task,
        _names(a, b),
        len(both),
        (sum(first) / len(both), sum(second) / len(both)),
        (metrics.clustered_interval(first, clusters), metrics.clustered_interval(second, clusters)),
        paired_difference(first, second, clusters),
        worse,
        better,
        mcnemar(len(worse), len(better)) if whole else None,
        {name: (of_a[name], of_b[name]) for name in of_a if name in of_b},
        tuple(_notes(a, b, len(both))),
    )


def _score(result: Result, name: str) -> Any:
    return result.rows[name]["score"]


def _change(a: Mapping[str, Any], b: Mapping[str, Any]) -> Change:
    outputs, scores = (a["output"], b["output"]), (a["score"], b["score"])
    return Change(a["id"], a["question"], tuple(a["answers"]), outputs, scores)


def _names(a: Result, b: Result) -> tuple[str, str]:
    """Of the two evaluations: the models' where these differ, else where they lie."""
    names = tuple(result.record.get("model", {}).get("name", "") for result in (a, b))
    if all(names) and names[0] != names[1]:
        return names[0], names[1]
    return str(a.path.parent), str(b.path.parent)


def _check_comparable(a: Result, b: Result) -> None:
    if a.task != b.task:
        raise ResultError(f"{a.path} is of the task {a.task}, and {b.path} of {b.task}: no question is the same")
    for key in SAME:
        if a.record.get(key) != b.record.get(key):
            raise ResultError(
                f"{a.path} has {key} {a.record.get(key)}, and {b.path} {b.record.get(key)}: their scores do not say "
                f"the same; evaluate one of them again with the other's (eval.py --help)"
            )
    other = [
        name
        for name, row in a.rows.items()
        if name in b.rows and any(row[key] != b.rows[name][key] for key in ("question", "answers"))
    ]
    if other:
        one = a.rows[other[0]], b.rows[other[0]]
        raise ResultError(
            f"{len(other)} questions of {a.path} are others in {b.path} under the same id: {other[0]!r} asks "
            f"{one[0]['question']!r} (answers {one[0]['answers'][:3]}), there {one[1]['question']!r} (answers "
            f"{one[1]['answers'][:3]}). Evaluate both on the same data, by the same version"
        )


def _notes(a: Result, b: Result, n: int) -> Iterator[str]:
    for key in TOLD:
        here, there = (_look_up(result.record, key) for result in (a, b))
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            differing = [name for name in {**here, **there} if here.get(name) != there.get(name)]
            if differing:
                yield f"{key} differ: " + ", ".join(
                    f"{name} {here.get(name)} / {there.get(name)}" for name in differing
                )
        elif here != there:
            yield f"{key.removeprefix('settings.')} differs: {here} / {there}"
    for name, result in (("the first", a), ("the second", b)):
        failed = sum("error" in row for row in result.rows.values())
        alone = len(result.rows) - n - failed
        if failed:
            yield f"{failed} questions could not be asked in {name}"
        if alone:
            yield f"{alone} questions were scored in {name} alone; they are not compared"


def _look_up(record: Mapping[str, Any], key: str) -> Any:
    value: Any = record
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


# --- what is shown ---------------------------------------------------------------------------------------------------


def show(comparison: Comparison) -> Group:
    """The comparison for a terminal."""
    c = comparison
    table = Table(title=f"{c.task}, {c.n} questions", title_justify="left")
    for name in ("", "score", "95% interval"):
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    for name, score, interval in zip(c.names, c.scores, c.intervals, strict=True):
        table.add_row(Text(name), f"{score:.1%}", f"{interval.low:.1%} to {interval.high:.1%}")
    table.add_section()
    low, high = c.difference.interval
    table.add_row("difference, paired", f"{c.difference.mean:+.1%}", f"{low:+.1%} to {high:+.1%}")
    lines: list[Any] = [table]
    lines += [Text(f"{name}: {a:.4g} / {b:.4g}") for name, (a, b) in c.metrics.items()]
    verdict = "the interval holds 0: no difference is shown" if low <= 0 <= high else "the interval does not hold 0"
    lines.append(
        Text(f"{len(c.worse)} worse, {len(c.better)} better, {c.n - len(c.worse) - len(c.better)} alike; {verdict}")
    )
    if c.p_value is not None:
        lines.append(Text(f"McNemar's exact test, as if questions were independent: p = {c.p_value:.3g}"))
    lines += [Text(f"Note: {note}") for note in c.notes]
    whole = c.p_value is not None
    for changes, title in (
        (c.worse, "right -> wrong" if whole else "worse"),
        (c.better, "wrong -> right" if whole else "better"),
    ):
        lines += [Text(line) for line in _changes(changes, title)]
    return Group(*lines)


def _changes(changes: Sequence[Change], title: str) -> Iterator[str]:
    for change in changes[:SHOWN]:
        a, b = (" ".join(output.split())[:80] for output in change.outputs)
        question = " ".join(change.question.split())[:120]
        yield f"{title}  {change.id}: {question} | {a!r} -> {b!r} | {' | '.join(dict.fromkeys(change.answers))[:80]}"
    if len(changes) > SHOWN:
        yield f"{title}  and {len(changes) - SHOWN} more (--output=FOLDER writes all)"


def write(comparison: Comparison, folder: epath.Path) -> epath.Path:
    """Writes FOLDER/TASK.compare.json: all of a comparison, every changed answer among it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{comparison.task}.compare.json"
    path.write_text(json.dumps(to_json(comparison), indent=2) + "\n")
    return path


def to_json(comparison: Comparison) -> dict[str, Any]:
    """A comparison as what JSON can say."""
    c = comparison
    change = lambda x: {**vars(x), "answers": list(x.answers), "outputs": list(x.outputs), "scores": list(x.scores)}  # noqa: E731
    return {
        "task": c.task,
        "names": list(c.names),
        "n": c.n,
        "scores": list(c.scores),
        "intervals": [list(interval) for interval in c.intervals],
        "difference": c.difference.mean,
        "interval": list(c.difference.interval),
        "effective_n": c.difference.effective_n,
        "p_value": c.p_value,
        "metrics": {name: list(values) for name, values in c.metrics.items()},
        "notes": list(c.notes),
        "worse": [change(x) for x in c.worse],
        "better": [change(x) for x in c.better],
    }


def run(a: str, b: str, output: str = "") -> None:
    """Prints comparisons, and writes them into a folder if one is named. Errors as of `compare_places`."""
    console = Console()
    for comparison in compare_places(a, b):
        console.print(show(comparison), highlight=False, soft_wrap=True)
        if output:
            path = write(comparison, epath.Path(output))
            console.print(f"All changed answers are in {path}", highlight=False, markup=False, soft_wrap=True)
