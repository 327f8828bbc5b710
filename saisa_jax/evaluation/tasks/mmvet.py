"""MM-Vet: 218 open questions. GPT-4 scores the answers; they are written as its notebook takes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from saisa_jax.evaluation.benchmark_files import BenchmarkFiles, need, read_lines
from saisa_jax.evaluation.tasks import TASKS
from saisa_jax.evaluation.tasks.task import Item, Row, TaskData, judged

THINK = "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"
FILES = BenchmarkFiles(
    ("mm-vet", "mmvet"),
    "lmms-lab-encoder/MMVet",
    ("test",),
    ("llava-mm-vet.jsonl",),
    "LLaVA's eval.zip, with the images of mm-vet.zip (yuweihao/MM-Vet) beside it",
)


def items(data: TaskData) -> Iterator[Item]:
    place = FILES.find(data)
    before = "" if data.prompts == "llava" else THINK
    if place.questions:
        for row in read_lines(place.questions):
            name, image = f"v1_{need(row, 'question_id', place.questions)}", place.picture("images", row["image"])
            yield Item(name, before + row["text"], (), (image,))
        return
    table = place.table(("question_id", "question", "image", "capability?"))
    for number in range(len(table)):
        row = table[number]
        name = str(row["question_id"])
        name = name if name.startswith("v1_") else f"v1_{name}"
        images = () if row["image"] is None else (row["image"],)
        yield Item(name, before + row["question"], (), images, row.get("capability") or "")


def answers(rows: Sequence[Row], data: TaskData) -> Mapping[str, bytes]:
    """{"v1_0": "...", ...}, as convert_mmvet_for_eval.py writes it."""
    return {"upload.json": json.dumps({row["id"]: row["output"] or "" for row in rows}, indent=2).encode()}


TASKS.register("mmvet")(
    judged(
        title="MM-Vet",
        items=items,
        files=answers,
        note="GPT-4 scores them: MM-Vet's notebook (mm-vet_evaluator.ipynb) takes the .upload.json",
    )
)
