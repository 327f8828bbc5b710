r"""Runs side by side as Markdown, for docs/proof.md and docs/family.md: accuracies, costs, differences, seeds, kinds.

    python -m proof.tables runs/proof --task=drawings --runs=saisa,naavit,llava --control=saisa-text \
        --output=tables.md

A run that is called NAME-seedN is another seed of NAME: the spread between the two is what a difference has to exceed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from saisa_jax.evaluation.compare import compare
from saisa_jax.evaluation.results import Result, read_result
from saisa_jax.report.runs import Run, read_run
from saisa_jax.report.units import duration, flops, interval, percent

REFERENCE = "llava"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def result(root: Path, name: str, task: str) -> Result:
    return read_result(str(root / name / "evaluation" / f"{task}.json"))


def share(part: dict) -> str:
    return f"{percent(part['accuracy'])} ({interval(part['interval'])})"


def accuracies(results: dict[str, Result]) -> Iterator[str]:
    """Overall and by part, with 95% intervals; the last row needs no picture."""
    first = next(iter(results.values())).record
    groups = list(first["groups"])
    rows = [
        [name, share(r.record["overall"]), *(share(r.record["groups"][group]) for group in groups)]
        for name, r in results.items()
    ]
    guesses = [percent(first["baseline"].get(group)) for group in ("overall", *groups)]
    yield from table(["", "all", *groups], [*rows, ["most frequent answer", *guesses]])


def kinds(results: dict[str, Result]) -> Iterator[str]:
    names = list(next(iter(results.values())).record["kinds"])
    rows = [[kind, *(share(r.record["kinds"][kind]) for r in results.values())] for kind in names]
    yield from table(["", *results], rows)


def costs(runs: dict[str, Run]) -> Iterator[str]:
    rows = []
    for name, run in runs.items():
        cost = run.evaluation["prefill_flops"] if run.evaluation else {}
        measured = [""] * 3
        if run.times:
            times = {key: 1e3 * statistics.median(run.times[key]) for key in ("first", "first_processor", "second")}
            measured = [f"{value:.1f}" for value in times.values()]
        told = [flops(cost.get("end_to_end")), flops(cost.get("decoder")), *measured]
        rows.append([name, *told, flops(run.train_flops), duration(run.wall_seconds)])
    head = ["", "prefill", "without encoder and head", "first question, ms", "of a processor, ms", "second, ms"]
    yield from table([*head, "training", "training time"], rows)


def differences(results: dict[str, Result]) -> Iterator[str]:
    """Of each run from LLaVA, paired; and of each seed from the other one."""
    pairs = [(REFERENCE, name) for name in results if name != REFERENCE and REFERENCE in results]
    pairs += [(name.partition("-seed")[0], name) for name in results if "-seed" in name]
    rows = []
    for a, b in pairs:
        if a in results:
            found = compare(results[a], results[b])
            low, high = (100 * bound for bound in found.difference.interval)
            rows.append([f"{b} less {a}", f"{100 * found.difference.mean:+.1f}", f"{low:+.1f} to {high:+.1f}"])
    yield from table(["", "points", "95%, paired"], rows)


def curves(runs: dict[str, Run]) -> Iterator[str]:
    """Held-out loss of each stage at its end."""
    rows = []
    for name, run in runs.items():
        losses = {stage.name: f"{stage.held_out[-1]['loss']:.3f}" for stage in run.stages if stage.held_out}
        steps = {stage.name: f"{(stage.summary or {}).get('steps', '')}" for stage in run.stages}
        rows.append([name, *(f"{losses.get(s, '')} ({steps.get(s, '')} steps)" for s in ("pretrain", "finetune"))])
    yield from table(["held-out loss", "stage 1", "stage 2"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--task", required=True, help="that all of them answered")
    parser.add_argument("--runs", required=True, help="folders of the root, with commas between")
    parser.add_argument("--control", help="the folder of an evaluation without pictures")
    parser.add_argument("--output", type=Path, required=True, help="the Markdown file")
    args = parser.parse_args()
    names = args.runs.split(",")
    runs = {name: read_run(str(args.root / name), args.task) for name in names}
    results = {name: result(args.root, name, args.task) for name in names}
    shown = results | ({args.control: result(args.root, args.control, args.task)} if args.control else {})
    sections = {
        "Accuracy": accuracies(shown),
        "By kind of question": kinds(shown),
        "Cost": costs(runs),
        "Differences": differences(results),
        "Loss": curves(runs),
    }
    text = [line for title, lines in sections.items() for line in (f"## {title}", "", *lines)]
    for path in sorted((args.root / "round-trip").glob("*.json")):
        found = json.loads(path.read_text())
        text += [
            f"Exported as `{found['layout']}` and imported again: {found['parameters']} parameters bit-equal, "
            f"{found['answers']} of {found['answers']} answers the same.",
            "",
        ]
    args.output.write_text("\n".join(text))


if __name__ == "__main__":
    main()
