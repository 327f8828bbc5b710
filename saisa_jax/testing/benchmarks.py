# ruff: noqa: E501
"""Small files of every benchmark, two pictures and about ten questions each, in both layouts."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

S = "\nAnswer the question using a single word or phrase."
C = "\nAnswer with the option's letter from the given choices directly."
COLORS = ("red", "blue")
QUESTIONS = range(10)


@lru_cache
def png(number: int) -> bytes:
    Image.new("RGB", (16, 16), COLORS[number % 2]).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def picture(number: int) -> dict[str, Any]:
    return {"bytes": png(number), "path": f"{number % 2}.png"}


def ask(number: int) -> str:
    return f"what is the color of part {number}?"


# --- LLaVA's playground/data/eval ------------------------------------------------------------------------------------


def write_llava(root: Path) -> Path:
    """A folder for each benchmark that LLaVA's guide has, and MMVP's own form."""
    for folder in ("vqav2/test2015", "gqa/data/images", "vizwiz/test", "textvqa/train_images", "pope/val2014", "mm-vet/images",
                   "llava-bench-in-the-wild/images", "seed_bench/SEED-Bench-image", "scienceqa/images/test", "MMVP/MMVP Images",
                   "MME/MME_Benchmark_release_version/color", "MME/MME_Benchmark_release_version/OCR/images"):  # fmt: skip
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in QUESTIONS if "MMVP" in folder else (0, 1):
            name = f"{number + 1}.jpg" if "MMVP" in folder else f"{number}.png"
            (root / folder / name).write_bytes(png(number))
    rows = [{"question_id": number, "image": f"{number % 2}.png", "text": ask(number) + S} for number in QUESTIONS]
    _lines(root / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", rows)
    _lines(root / "vqav2/llava_vqav2_mscoco_test2015.jsonl", [*rows, {**rows[0], "question_id": 99}])
    _lines(root / "gqa/llava_gqa_testdev_balanced.jsonl", rows)
    answers = {str(number): {"question": ask(number), "answer": COLORS[number % 2]} for number in QUESTIONS}
    _json(root / "gqa/data/testdev_balanced_questions.json", answers)
    unanswerable = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    _lines(
        root / "vizwiz/llava_test.jsonl", [{**row, "text": ask(row["question_id"]) + unanswerable + S} for row in rows]
    )
    ocr = [
        {**row, "question_id": "01"[n % 2], "text": f"{ask(n)}\nReference OCR token: STOP, {n}{S}"} for n, row in enumerate(rows)
    ]  # fmt: skip
    _lines(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl", ocr)
    data = [
        {
            "question_id": 500 + n,
            "image_id": "01"[n % 2],
            "question": ask(n),
            "answers": [COLORS[n % 2]] * 8 + ["a", "b"],
        }
        for n in QUESTIONS
    ]
    _json(root / "textvqa/TextVQA_0.5.1_val.json", {"data": data})
    _write_pope(root / "pope")
    _write_mme(root / "MME")
    problems = {
        str(n): {"question": ask(n), "choices": [*COLORS], "hint": "", "answer": n % 2, "image": "i"} for n in QUESTIONS
    }
    _json(root / "scienceqa/problems.json", problems)
    value = "Context: N/A\n{}\nA. red\nB. blue"
    sqa = [
        {
            "id": str(n),
            "image": f"{n % 2}.png",
            "conversations": [{"from": "human", "value": f"<image>\n{value.format(ask(n))}"}],
        }
        for n in QUESTIONS
    ]
    _json(root / "scienceqa/llava_test_CQM-A.json", [*sqa, {"id": "x", "conversations": sqa[0]["conversations"]}])
    seed = [
        {**row, "image": f"SEED-Bench-image/{row['image']}", "text": f"{ask(n)}\nA. red\nB. blue\nC. a\nD. b{C}"}
        for n, row in enumerate(rows)
    ]
    _lines(root / "seed_bench/llava-seed-bench.jsonl", seed)
    truth = [{"question_id": str(n), "answer": "AB"[n % 2], "data_type": "image" if n else "video", "question_type_id": 1}
             for n in QUESTIONS]  # fmt: skip
    _json(root / "seed_bench/SEED-Bench.json", {"questions": truth, "question_type": {"Scene Understanding": 1}})
    _lines(root / "mm-vet/llava-mm-vet.jsonl", [{**row, "text": ask(row["question_id"])} for row in rows])
    _lines(
        root / "llava-bench-in-the-wild/questions.jsonl",
        [{**row, "text": "Describe it.", "category": "conv"} for row in rows],
    )
    for folder, name in (("mmbench", "mmbench_dev_20230712.tsv"), ("mmbench_cn", "mmbench_dev_cn_20231003.tsv")):
        (root / folder).mkdir(exist_ok=True)
        _write_mmbench(root / folder / name)
    lines = ["Index,Question,Options,Correct Answer"]
    lines += [f'{n + 1},"{ask(n)}",(a) Red (b) Blue,({"ab"[n % 2]})' for n in QUESTIONS]
    (root / "MMVP/Questions.csv").write_text("\n".join(lines) + "\n")
    return root


def _write_pope(folder: Path) -> None:
    rows, splits = [], ("adversarial", "popular", "random")
    for number, split in enumerate(split for split in splits for _ in range(4)):
        text = f"Is there a dog {number} in the image?{S}"
        rows.append({"question_id": number, "image": f"{number % 2}.png", "text": text, "category": split})
    _lines(folder / "llava_pope_test.jsonl", rows)
    (folder / "coco").mkdir()
    for split in splits:
        _lines(folder / f"coco/coco_pope_{split}.json", [{"label": ("yes", "no")[n % 2]} for n in range(4)])


def _write_mme(folder: Path) -> None:
    release, rows = folder / "MME_Benchmark_release_version", []
    (release / "OCR/questions_answers_YN").mkdir(parents=True)
    for category, texts in (("color", "color/{}"), ("OCR", "OCR/questions_answers_YN/{}")):
        for number in (0, 1):
            asked = [f"Is part {number} {color}?" for color in COLORS]
            lines = [f"{text} Please answer yes or no.\t{say}" for text, say in zip(asked, ("Yes", "No"), strict=True)]
            (release / f"{texts.format(number)}.txt").write_text("\n".join(lines))
            image = f"{category}/images/{number}.png" if category == "OCR" else f"{category}/{number}.png"
            rows += [{"question_id": f"{category}/{number}.png", "image": image, "text": text + S} for text in asked]
    _lines(folder / "llava_mme.jsonl", [*rows, rows[0]])


def mmbench_rows() -> list[dict[str, Any]]:
    """Five questions in two turns each."""
    return [
        {"index": n + turn * 1_000_000, "question": ask(n), "hint": "Look." if n else None}
        | {"A": COLORS[turn], "B": COLORS[1 - turn], "C": None, "D": None, "answer": "AB"[(n + turn) % 2], "category": "c"}
        | {"number": n, "source": "s", "l2-category": "wide", "comment": None, "split": "dev"}
        for n in range(5)
        for turn in (0, 1)
    ]  # fmt: skip


def _write_mmbench(path: Path) -> None:
    names = [
        "index",
        "question",
        "hint",
        "A",
        "B",
        "C",
        "D",
        "answer",
        "category",
        "image",
        "source",
        "l2-category",
        "comment",
        "split",
    ]
    rows = [{**row, "image": base64.b64encode(png(row["number"])).decode()} for row in mmbench_rows()]
    lines = ["\t".join("" if row[name] is None else str(row[name]) for name in names) for row in rows]
    path.write_text("\n".join(["\t".join(names), *lines]) + "\n")


def _lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


# --- Parquet files of the Hub ----------------------------------------------------------------------------------------


def write_hub(root: Path) -> Path:
    """A folder for each benchmark, named as its repository."""
    ten = [{"answer": "red", "answer_confidence": "yes", "answer_id": n} for n in range(10)]
    texts = ["red"] * 8 + ["a", "b"]
    plain = [{"question_id": n, "question": ask(n), "image": picture(n)} for n in QUESTIONS]
    four = {f"choice_{letter}": text for letter, text in zip("abcd", [*COLORS, "x", "y"], strict=True)}
    yes = [("yes", "no")[n % 2] for n in range(12)]
    tables: dict[str, list[dict[str, Any]]] = {
        "VQAv2/data/validation-00000-of-00001": [{**row, "answers": ten, "answer_type": "other"} for row in plain],
        "GQA/testdev_balanced_images/testdev-00000-of-00001": [{"id": f"n{n}", "image": picture(n)} for n in (0, 1)],
        "GQA/testdev_balanced_instructions/testdev-00000-of-00001": [
            {"id": str(n), "imageId": f"n{n % 2}", "question": ask(n), "answer": COLORS[n % 2]} for n in QUESTIONS
        ],
        "VizWiz-VQA/data/val-00000-of-00001": [
            {**row, "question_id": f"VizWiz_val_{n}.jpg", "answers": texts, "category": "other"} for n, row in enumerate(plain)
        ],
        "textvqa/data/validation-00000-of-00001": [{**row, "answers": texts, "ocr_tokens": ["STOP", "1"]} for row in plain],
        "ScienceQA/ScienceQA-IMG/test-00000-of-00001": [
            {"question": ask(n), "choices": [*COLORS], "hint": "Look." if n else "", "answer": n % 2, "image": picture(n)}
            for n in QUESTIONS
        ],
        "POPE/data/test-00000-of-00001": [
            {"id": str(n), "question_id": str(n), "question": f"Is there a dog {n}?", "answer": yes[n], "image": picture(n)}
            | {"category": ("adversarial", "popular", "random")[n // 4]} for n in range(12)
        ],
        "MME/data/test-00000-of-00001": [
            {"question_id": f"{kind}/{n // 2}.png", "question": f"Is {n} so? Please answer yes or no.", "answer": yes[n].title()}
            | {"category": kind, "image": picture(n // 2)} for kind in ("color", "code_reasoning") for n in range(6)
        ],
        "SEED-Bench/data/test-00000-of-00001": [
            {**row, **four, "question_id": str(n), "answer": "AB"[n % 2], "data_type": "image" if n else "video"}
            | {"image": [picture(n)], "question_type_id": 1} for n, row in enumerate(plain)
        ],
        "MMMU/data/validation-00000-of-00001": [
            {"id": f"validation_Art_{n}", "question": f"What is <image 1>{' beside <image 2>' if n == 3 else ''}?"}
            | {"options": "[]" if n == 4 else str([*COLORS]), "answer": "red" if n == 4 else "AB"[n % 2]}
            | {"question_type": "open" if n == 4 else "multiple-choice", "image_1": picture(n)}
            | {"image_2": picture(1) if n == 3 else None} for n in QUESTIONS
        ],
        "MMStar/mmstar": [
            {"index": n, "question": f"{ask(n)}\nOptions: A: red, B: blue", "image": picture(n), "answer": "AB"[n % 2]}
            | {"category": "math", "l2_category": ("geometry", "statistics")[n % 3 == 0]} for n in QUESTIONS
        ],
        "CV-Bench/test_2d": [
            {"idx": n, "type": "2D", "task": "Count", "image": picture(n), "question": ask(n), "choices": ["1", "2"]}
            | {"answer": f"({'AB'[n % 2]})", "prompt": f"{ask(n)}\n(A) 1\n(B) 2", "source": ("ADE20K", "COCO", "Omni3D")[n % 3]}
            for n in QUESTIONS
        ],
        "MMVP/data/train-00000-of-00001": [
            {"Index": n + 1, "Question": ask(n), "Options": "(a) Red (b) Blue", "Correct Answer": f"({'ab'[n % 2]})"}
            | {"image": picture(n)} for n in QUESTIONS
        ],
        "OCRBench/data/test-00000-of-00001": [
            {"dataset": ("IIIT5K", "HME100k")[n % 2], "question": "what is written?", "question_type": "Regular Text Recognition"}
            | {"answer": ["RED"], "image": picture(n)} for n in QUESTIONS
        ],
        "MMVet/data/test-00000-of-00001": [
            {**row, "question_id": f"v1_{n}", "answer": "red", "capability": "rec"} for n, row in enumerate(plain)
        ],
        "llava-bench-in-the-wild/data/train-00000-of-00001": [{**row, "category": "conv"} for row in plain],
    }  # fmt: skip
    for language in ("en", "cn"):
        tables[f"MMBench/{language}/dev-00000-of-00001"] = [
            {key: row[key] for key in ("index", "question", "answer", "A", "B", "category", "source", "split")}
            | {"hint": row["hint"] or "nan", "C": "nan", "D": "nan", "L2-category": "wide", "image": picture(row["number"])}
            for row in mmbench_rows()
        ]  # fmt: skip
    for name, rows in tables.items():
        write_parquet(root / f"{name}.parquet", rows)
    return root


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
