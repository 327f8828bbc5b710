"""What `make lmms` runs: lmms-eval, offline, answers and scores POPE and MMMU as `eval.py --prompts=lmms` does.

    python integrations/lmms_eval/check.py FOLDER

A tiny model learns to tell which shape is red. POPE is twenty-four such questions in a parquet file; so is MMMU, whose
pictures stand among the words. lmms-eval asks the model through the adapter, chat and simple, and through its own
`openai` model, of a server that `saisa_jax serve` is. (MMMU's simple form is another prompt: its pictures stand in
front. --limit: the tests' recipe asks eight questions unless it is told otherwise.)
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lmms_eval
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).parents[2]
TASKS = Path(str(lmms_eval.__file__)).parent / "tasks"
COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 128, 0), "yellow": (255, 255, 0)}
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
TOKENS = 8
TASK = """
include: {original}
task: {name}_local
dataset_path: parquet
dataset_kwargs:
  data_files:
    {split}: {data}
"""
SPLITS = {"pope": "test", "mmmu": "validation"}


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    asked = {"pope": list(map(pope, range(24))), "mmmu": list(map(mmmu, range(24)))}
    for name, pairs in asked.items():
        path = folder / name / f"{SPLITS[name]}-00000-of-00001.parquet"
        write(path, [question for question, _ in pairs])
        original = TASKS / name / {"pope": "pope.yaml", "mmmu": "mmmu_val.yaml"}[name]
        (folder / "tasks").mkdir(exist_ok=True)
        yaml = TASK.format(original=original, name=name, split=SPLITS[name], data=path)
        (folder / "tasks" / f"{name}_local.yaml").write_text(yaml)
    write(
        folder / "train" / "train-00000-of-00001.parquet", [learned for pairs in asked.values() for _, learned in pairs]
    )
    train(folder)
    run(
        *("eval.py", f"--workdir={folder / 'run'}", "--tasks=pope,mmmu", f"--data={folder}", "--prompts=lmms"),
        *(f"--output={folder / 'ours'}", f"--max_new_tokens={TOKENS}", "--batch_size=8", "--limit=24"),
    )
    ours = {name: rows_of(folder / "ours" / "evaluation" / f"{name}.jsonl") for name in asked}
    adapter = f"--model saisa_jax --model_args checkpoint={folder / 'run'},max_new_tokens={TOKENS} --batch_size 8"
    compare("chat", ours, lmms(folder, "chat", ("pope", "mmmu"), adapter))
    compare("simple", ours, lmms(folder, "simple", ("pope",), f"{adapter} --force_simple"))
    with served(folder / "run") as url:
        openai = f"--model openai --model_args model=tiny,base_url={url}/v1,api_key=none --batch_size 1"
        compare("openai, served", ours, lmms(folder, "openai", ("pope", "mmmu"), openai))


# --- the data: what is asked, and what the model learns of it --------------------------------------------------------


def pope(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    color = ("red", "blue", "red", "green", "red", "yellow")[number % 6]
    question, answer = "is the shape red?", "yes" if color == "red" else "no"
    row = {"id": str(number), "question_id": str(number), "question": question, "answer": answer}
    row |= {"category": ("random", "popular", "adversarial")[number % 3], "image": picture(color, number)}
    return row, learned(f"{question}\n{SHORT}", answer, [row["image"]])


def mmmu(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Three of four are choices between two pictures among the words; one is open, its picture in front."""
    subject = ("Art", "Music", "Physics")[number % 3]
    first, second = (("red", "blue"), ("green", "red"), ("yellow", "red"), ("red", "green"))[number % 4]
    row: dict[str, Any] = {"id": f"validation_{subject}_{number}", "question_type": "open"}
    images = [picture(first, number)]
    if number % 4 == 3:
        row |= {"question": "<image 1> What color is it?", "options": "[]", "answer": first}
        said = f"<image>\nWhat color is it?\n\n{SHORT}"
    else:
        images.append(picture(second, number))
        row |= {"question_type": "multiple-choice", "options": "['the first', 'the second']"}
        row |= {"question": "Which is red, <image 1> or <image 2>?", "answer": "A" if first == "red" else "B"}
        said = f"Which is red,\n<image>\nor\n<image>\n?\nA. the first\nB. the second\n\n{LETTER}"
    row |= {f"image_{n}": images[n - 1] if n <= len(images) else None for n in range(1, 8)}
    return row, learned(said, row["answer"], images)


def learned(question: str, answer: str, images: Sequence[Any]) -> dict[str, Any]:
    return {"texts": [{"user": question, "assistant": answer}], "images": images}


def picture(color: str, number: int) -> dict[str, Any]:
    stream = io.BytesIO()
    Image.new("RGB", (32, 24 + number % 5), COLORS[color]).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A parquet file, with what `datasets` needs to know of its pictures."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    named = lambda name: name.startswith("image") and name != "images"  # noqa: E731
    text = {"dtype": "string", "_type": "Value"}
    metadata, schema = None, None
    if "texts" not in rows[0]:
        features = {name: {"_type": "Image"} if named(name) else text for name in rows[0]}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        schema = pa.schema([(name, image if named(name) else pa.string()) for name in rows[0]], metadata)
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


# --- the programs ----------------------------------------------------------------------------------------------------


def train(folder: Path) -> None:
    """A model of a tokenizer that knows every letter."""
    tokenizer = folder / "tokenizer"
    code = "from saisa_jax.testing.tokenizers import byte_level; byte_level().save_pretrained({!r})"
    run("-c", code.format(str(tokenizer)))
    source = f"({{'format': 'parquet', 'path': '{folder / 'train'}'}},)"
    finetune = {"steps": 150, "optimizer.lr": 0.004, "text_length": 256, "max_images": 2, "sources": source}
    run(
        *("train.py", "--config=saisa_jax/testing/configs.py", f"--workdir={folder / 'run'}"),
        *("--config.stages=finetune", "--config.model.max_length=512", "--config.model.vocab_size=512"),
        *(f"--config.data.tokenizer={tokenizer}", "--config.training.log_every=50", "--config.training.eval_every=0"),
        *(f"--config.finetune.{name}={value}" for name, value in finetune.items()),
        "--config.finetune.validation=()",
    )


def lmms(folder: Path, name: str, tasks: Sequence[str], model: str) -> dict[str, list[dict[str, Any]]]:
    """The samples of each task as lmms-eval logs them, in the order of the questions."""
    output, named = folder / name, ",".join(f"{task}_local" for task in tasks)
    flags = f"{model} --tasks {named} --include_path {folder / 'tasks'} --log_samples --output_path {output}"
    run("-m", "lmms_eval", *flags.split())
    samples = {task: rows_of(next(output.rglob(f"*samples_{task}_local.jsonl"))) for task in tasks}
    return {task: sorted(rows, key=lambda row: row["doc_id"]) for task, rows in samples.items()}


@contextlib.contextmanager
def served(model: Path) -> Iterator[str]:
    """The address of a server of the model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, command = f"http://127.0.0.1:{port}", ("-m", "saisa_jax", "serve", f"--checkpoint={model}", f"--port={port}")
    server = subprocess.Popen([sys.executable, *command, "--name=tiny"], cwd=ROOT, env=environment())
    try:
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health"):  # refused, or 503
                break
            if server.poll() is not None:
                raise SystemExit(f"the server ended with {server.returncode} before it answered")
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait()


def run(*arguments: str) -> None:
    """Python with these arguments, in the checkout, without the network."""
    print("$", " ".join(arguments), flush=True)
    subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment(), check=True)


def environment() -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    return os.environ | offline | {"PYTHONPATH": str(ROOT), "HF_HOME": str(Path(sys.argv[1]).resolve() / "cache")}


# --- what must be equal ----------------------------------------------------------------------------------------------


def compare(
    name: str, ours: Mapping[str, Sequence[Mapping[str, Any]]], theirs: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Answers and scores, question by question."""
    for task, samples in theirs.items():
        expected = [(row["output"].strip(), float(row["score"])) for row in ours[task]]
        found = [(answer(row), score(task, row)) for row in samples]
        differ = [n for n, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]]
        if differ:
            n = differ[0]
            raise SystemExit(
                f"{name}, {task}: {len(differ)} of {len(found)} differ, the first at {n}: lmms-eval has {found[n]}, "
                f"eval.py {expected[n]}"
            )
        right, said = sum(one for _, one in found), sorted({text for text, _ in found})
        print(f"{name}, {task}: all {len(found)} answers and scores are those of eval.py ({right:.0f} right; {said})")


def answer(row: Mapping[str, Any]) -> str:
    found = row["filtered_resps"]
    return (found if isinstance(found, str) else found[0]).strip()


def score(task: str, row: Mapping[str, Any]) -> float:
    if task == "pope":
        return row["pope_accuracy"]["score"]
    utils = importlib.import_module("lmms_eval.tasks.mmmu.utils")  # which scores all of them when they are there
    return utils.evaluate_mmmu([row["mmmu_acc"]])[1]["acc"]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
