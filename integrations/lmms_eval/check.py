"""What `make lmms` runs: lmms-eval, offline, answers and scores POPE as `eval.py --prompts=lmms` does.

    python integrations/lmms_eval/check.py FOLDER

A tiny model learns to tell whether a shape is red; POPE is twenty-four such questions in a parquet file. (--limit: the
tests' recipe asks eight unless it is told otherwise.)
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lmms_eval
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).parents[2]
COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 128, 0), "yellow": (255, 255, 0)}
QUESTION, SUFFIX = "is the shape red?", "\nAnswer the question using a single word or phrase."
TOKENS = 8
TASK = """
include: {pope}
task: pope_local
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
"""


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    make_data(folder)
    source = f"({{'format': 'parquet', 'path': '{folder / 'train'}'}},)"
    finetune = {"steps": 60, "optimizer.lr": 0.004, "text_length": 64, "sources": source, "validation": "()"}
    run(
        *("train.py", "--config=saisa_jax/testing/configs.py", f"--workdir={folder / 'run'}"),
        *("--config.stages=finetune", *(f"--config.finetune.{name}={value}" for name, value in finetune.items())),
    )
    data = folder / "pope" / "test-00000-of-00001.parquet"
    pope = Path(str(lmms_eval.__file__)).parent / "tasks" / "pope" / "pope.yaml"
    (folder / "tasks").mkdir()
    (folder / "tasks" / "pope_local.yaml").write_text(TASK.format(pope=pope, data=data))
    run(
        *("eval.py", f"--workdir={folder / 'run'}", "--tasks=pope", f"--data={folder / 'pope'}", "--prompts=lmms"),
        *(f"--output={folder / 'ours'}", f"--max_new_tokens={TOKENS}", "--batch_size=8", "--limit=24"),
    )
    ours = [json.loads(line) for line in next((folder / "ours").rglob("pope*.jsonl")).read_text().splitlines()]
    expected = [(row["output"].strip(), float(row["score"])) for row in ours]
    for interface in ((), ("--force_simple",)):
        output = folder / f"theirs{len(interface)}"
        model = f"--model saisa_jax --model_args checkpoint={folder / 'run'},max_new_tokens={TOKENS} --batch_size 8"
        task = f"--tasks pope_local --include_path {folder / 'tasks'} --log_samples --output_path {output}"
        run("-m", "lmms_eval", *model.split(), *task.split(), *interface)
        samples = [json.loads(line) for line in next(output.rglob("*samples*.jsonl")).read_text().splitlines()]
        samples.sort(key=lambda row: row["doc_id"])
        theirs = [(answer(row), row["pope_accuracy"]["score"]) for row in samples]
        differ = [number for number, pair in enumerate(zip(theirs, expected, strict=True)) if pair[0] != pair[1]]
        name = "simple" if interface else "chat"
        if differ:
            raise SystemExit(
                f"{name}: {len(differ)} of {len(theirs)} differ, the first at {differ[0]}: {theirs[differ[0]]}"
            )
        correct = sum(score for _, score in theirs)
        said = sorted({text for text, _ in theirs})
        print(f"{name}: all {len(theirs)} answers and scores are those of eval.py ({correct:.0f} right; said: {said})")


def answer(row: dict[str, Any]) -> str:
    found = row["filtered_resps"]
    return (found if isinstance(found, str) else found[0]).strip()


def make_data(folder: Path) -> None:
    """Parquet files to learn from and to be asked of, with what `datasets` needs to know of the pictures."""
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    asked = []
    for number in range(24):
        color = ("red", "blue", "red", "green", "red", "yellow")[number % 6]
        stream = io.BytesIO()
        Image.new("RGB", (32, 24 + number % 5), COLORS[color]).save(stream, "PNG")
        row = {"id": str(number), "question_id": str(number), "question": QUESTION}
        row |= {
            "answer": "yes" if color == "red" else "no",
            "category": ("random", "popular", "adversarial")[number % 3],
        }
        asked.append(row | {"image": {"bytes": stream.getvalue(), "path": None}})
    text = {"dtype": "string", "_type": "Value"}
    features = {name: {"_type": "Image"} if name == "image" else text for name in asked[0]}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    columns = [(name, picture if name == "image" else pa.string()) for name in asked[0]]
    learned = [
        {"texts": [{"user": row["question"] + SUFFIX, "assistant": row["answer"]}], "images": [row["image"]]}
        for row in asked
    ]
    for name, table in (
        ("pope/test-00000-of-00001", pa.Table.from_pylist(asked, schema=pa.schema(columns, metadata))),
        ("train/train-00000-of-00001", pa.Table.from_pylist(learned)),
    ):
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(table, path)


def run(*arguments: str) -> None:
    """Python with these arguments, in the checkout, without the network."""
    print("$", " ".join(arguments), flush=True)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    environment = (
        os.environ | offline | {"PYTHONPATH": str(ROOT), "HF_HOME": str(Path(sys.argv[1]).resolve() / "cache")}
    )
    subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, check=True)


if __name__ == "__main__":
    main()
