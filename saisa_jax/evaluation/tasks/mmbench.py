"""MMBench and MMBench-CN, dev: every question as often as it has choices, turned; right if all turns are (circular).

LLaVA's figures are the server's, which takes the .upload.xlsx and asks a judge about answers without a letter; here
such answers are read by rule, as lmms-eval's `static` scoring does.
"""

from __future__ import annotations

import base64
import binascii
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from saisa_jax.data.sample import DataError
from saisa_jax.evaluation.benchmark_files import BenchmarkFiles, need, read_table
from saisa_jax.evaluation.prompts import LETTER, options
from saisa_jax.evaluation.scorers.letters import mmbench_letter
from saisa_jax.evaluation.sheet import xlsx
from saisa_jax.evaluation.tasks import TASKS
from saisa_jax.evaluation.tasks.task import Item, Row, Task, TaskData

ROUND = 1_000_000  # the k-th turn of question i has the index i + k ROUND
LLAVA = {"en": LETTER, "cn": "\n请直接回答选项字母。"}
LMMS = {"en": LETTER, "cn": "\n请直接使用所提供的选项字母作为答案回答。"}
SOURCE = "download.openmmlab.com/mmclassification/datasets/mmbench"
COLUMNS = ("index", "question", "A", "B", "C?", "D?", "image", "hint?", "answer?", "category?", "L2-category?")
FILES = {
    "en": BenchmarkFiles(("mmbench",), "lmms-lab-encoder/MMBench", ("dev",), ("mmbench_dev_20230712.tsv",), SOURCE),
    "cn": BenchmarkFiles(
        ("mmbench_cn", "mmbench"), "lmms-lab-encoder/MMBench", ("dev",), ("mmbench_dev_cn_20231003.tsv",), SOURCE
    ),
}


def items(data: TaskData, language: str) -> Iterator[Item]:
    place = FILES[language].find(data)
    if place.questions:
        for row in read_table(place.questions):
            for name in ("index", "question", "A", "B", "image"):
                need(row, name, place.questions)
            row["L2-category"] = row.get("l2-category")
            yield _item(row, _decoded(row, str(place.questions)), data.prompts, language, _missing)
        return
    table = place.table((*COLUMNS, "source?", "split?"), language)
    for number in range(len(table)):
        row = table[number]
        yield _item(row, row["image"], data.prompts, language, lambda text: text is None)


def _decoded(row: Mapping[str, Any], path: str) -> bytes:
    try:
        return base64.b64decode(row["image"] or "", validate=True)
    except binascii.Error as error:
        raise DataError(f"{path}: the picture is no base64 text, or cut: {error}", str(row["index"])) from error


def _item(row: Mapping[str, Any], image: Any, school: str, language: str, missing: Any) -> Item:
    choices = {}
    for letter in "ABCD":
        if missing(row.get(letter)):
            break
        choices[letter] = row[letter]
    shown = [text for text in choices.values() if not _missing(text)]
    hint = None if _missing(row.get("hint")) else row["hint"]
    if school == "llava":
        question = (f"{hint}\n" if hint else "") + f"{row['question']}\n{options(shown)}{LLAVA[language]}"
    else:
        if language == "cn":
            hint = row.get("hint")  # lmms-eval puts a hint of "nan" in front here, and not in the English questions
        question = (f"{hint} " if hint else "") + f"{row['question']} There are several options:\n{options(shown)}"
        question += f"\n{LMMS[language]}"
    answer = row.get("answer")
    kept = ("question", "category", "L2-category", "hint", "source", "split")
    extra = {"index": int(row["index"]), "choices": choices} | {key: row.get(key) for key in kept}
    right = () if _missing(answer) else (str(answer),)
    return Item(str(row["index"]), question, right, (image,), row.get("category") or "", extra=extra)


def _missing(text: Any) -> bool:
    return text is None or str(text).lower() in ("nan", "none", "")


def parse(output: str, item: Item) -> str:
    return mmbench_letter(output.strip(), item.extra["choices"])


def metrics(rows: Sequence[Row]) -> Mapping[str, float]:
    """Of the questions, those that are right in every turn; also of each wider category."""
    turns: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        turns[row["extra"]["index"] % ROUND].append(row)
    hits = {name: float(all(row["score"] for row in one)) for name, one in turns.items()}
    found = {"circular": sum(hits.values()) / len(hits)}
    wider: dict[str, list[float]] = defaultdict(list)
    for name, one in turns.items():
        if category := one[0]["extra"].get("L2-category"):
            wider[category].append(hits[name])
    return found | {f"circular {name}": sum(part) / len(part) for name, part in sorted(wider.items())}


def upload(rows: Sequence[Row], data: TaskData) -> Mapping[str, bytes]:
    """The server's table: LLaVA's columns, or lmms-eval's."""
    letters, of = "ABCD", [(row, row["extra"]) for row in rows]
    if data.prompts == "llava":
        head = ("index", "question", *letters, "prediction", "answer", "split")
    else:
        head = ("index", "question", "answer", "prediction", "hint", "source", "split", "category", "L2-category")
        head += (*letters, "E")
    lines = [
        [
            {
                **extra,
                **extra["choices"],
                "prediction": row["output"],
                "answer": row["answers"][0] if row["answers"] else None,
            }.get(name)
            for name in head
        ]
        for row, extra in of
    ]
    table = "".join("\t".join(_plain(cell) for cell in line) + "\n" for line in (head, *lines))
    return {"upload.xlsx": xlsx([list(head), *lines]), "upload.tsv": table.encode()}


def _plain(cell: Any) -> str:
    return "" if cell is None else " ".join(str(cell).split())


for _name, _title, _language in (("mmbench", "MMBench", "en"), ("mmbench_cn", "MMBench-CN", "cn")):
    TASKS.register(_name)(
        Task(
            title=_title,
            items=partial(items, language=_language),
            score=lambda output, item: float(parse(output, item) == item.answers[0]),
            metric="letter",
            parse=parse,
            metrics=metrics,
            headline="circular",
            files=upload,
            note="the data have no answers; the server (mmbench.opencompass.org.cn) takes the .upload.xlsx",
            schools={"llava": {}, "lmms": {}},
        )
    )
