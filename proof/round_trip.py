"""A trained model, exported and imported again: the same bits, and the same answers.

    python -m proof.round_trip runs/proof/saisa --data=runs/proof/drawings --output=runs/proof/round-trip

Each layout in turn; DIR/LAYOUT.json says how many parameters were compared and how many answers, and a difference is an
error. A layout that is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from saisa_jax.__main__ import main as saisa_jax
from saisa_jax.checkpoints import read_account
from saisa_jax.evaluation.results import read_result


def round_trip(run: Path, layout: str, data: Path, output: Path, limit: int) -> dict[str, object]:
    """Exports, imports, compares every parameter's checksum, and asks the first questions again."""
    trained, exported, again = run / "finetune/model", output / layout, output / f"{layout}-imported"
    for directory in (exported, again):
        shutil.rmtree(directory, ignore_errors=True)
    call("convert", "export", f"--from={trained}", f"--layout={layout}", f"--to={exported}")
    call("convert", "import", f"--from={exported}", f"--to={again}", *system_prompt(trained))
    before, after = (read_account(str(place))[0]["leaves"] for place in (trained, again))
    others = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    if others:
        sys.exit(f"{layout}: {len(others)} of {len(before)} parameters are not what they were: {', '.join(others[:5])}")
    call("eval", f"--checkpoint={again}", "--tasks=drawings", f"--data={data}", f"--limit={limit}", f"--output={again}")
    first, second = (read_result(str(place / "evaluation/drawings.json")).rows for place in (run, again))
    asked = [name for name in first if name in second]
    changed = [name for name in asked if first[name]["output"] != second[name]["output"]]
    if changed:
        sys.exit(f"{layout}: {len(changed)} of {len(asked)} answers are others: {', '.join(changed[:5])}")
    return {"layout": layout, "parameters": len(before), "bit_equal": True, "answers": len(asked), "same_answers": True}


def system_prompt(trained: Path) -> list[str]:
    """The import takes what stands around questions from the files, which say nothing of an empty system prompt."""
    config = read_account(str(trained))[1]
    said = config.data.system_prompt
    return [f"--template={config.finetune.template}", *([] if said is None else [f"--system_prompt={said}"])]


def call(*words: str) -> None:
    if status := saisa_jax(list(words)):
        sys.exit(f"saisa_jax {' '.join(words)}: status {status}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run that has been evaluated on `drawings`")
    parser.add_argument("--data", type=Path, required=True, help="the set of drawings")
    parser.add_argument("--output", type=Path, required=True, help="a directory")
    parser.add_argument("--layouts", default="saisa,hf", help="with commas between (default: saisa,hf)")
    parser.add_argument("--limit", type=int, default=200, help="questions that are asked again (default: 200)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for layout in args.layouts.split(","):
        record = args.output / f"{layout}.json"
        if not record.exists():
            found = round_trip(args.run, layout, args.data, args.output, args.limit)
            record.write_text(json.dumps(found) + "\n")
        print(record.read_text().strip())


if __name__ == "__main__":
    main()
