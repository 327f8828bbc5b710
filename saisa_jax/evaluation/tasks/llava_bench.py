"""LLaVA-Bench in the wild: 60 open questions. GPT-4 compares the answers with its own; they are written as LLaVA's
eval_gpt_review_bench.py takes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from saisa_jax.evaluation.benchmark_files import BenchmarkFiles, need, read_lines
from saisa_jax.evaluation.tasks import TASKS
from saisa_jax.evaluation.tasks.task import Item, Row, TaskData, judged

FILES = BenchmarkFiles(
    ("llava-bench-in-the-wild", "llava-bench"),
    "lmms-lab-encoder/llava-bench-in-the-wild",
    ("train", "test"),
    ("questions.jsonl",),
    "liuhaotian/llava-bench-in-the-wild of the Hub",
)


def items(data: TaskData) -> Iterator[Item]:
    place = FILES.find(data)
    if place.questions:
        for row in read_lines(place.questions):
            name = str(need(row, "question_id", place.questions))
            yield Item(name, row["text"], (), (place.picture("images", row["image"]),), row.get("category") or "")
        return
    table = place.table(("question_id", "question", "image", "category?"))
    for number in range(len(table)):
        row = table[number]
        yield Item(str(row["question_id"]), row["question"], (), (row["image"],), row.get("category") or "")


def answers(rows: Sequence[Row], data: TaskData) -> Mapping[str, bytes]:
    """A line for each question, in their order."""
    lines = [
        {
            "question_id": int(row["id"]) if row["id"].isdigit() else row["id"],
            "prompt": row["question"],
            "text": row["output"] or "",
            "answer_id": f"saisa_jax-{row['id']}",
            "model_id": "saisa_jax",
            "metadata": {},
        }
        for row in rows
    ]
    return {"upload.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode()}


TASKS.register("llava_bench")(
    judged(
        title="LLaVA-Bench (in the wild)",
        items=items,
        files=answers,
        note="GPT-4 scores them: LLaVA's eval_gpt_review_bench.py takes the .upload.jsonl as the second --answer-list",
    )
)
