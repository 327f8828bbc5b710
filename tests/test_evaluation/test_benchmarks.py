"""Every benchmark on small files in both layouts: what is asked, what is right, what is written, what goes wrong."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from saisa_jax.cli.eval import main as eval_main
from saisa_jax.config import SCHOOLS, ConfigError
from saisa_jax.data.sample import DataError
from saisa_jax.evaluation import answers, scoring
from saisa_jax.evaluation.runner import read_items
from saisa_jax.evaluation.tasks import TASKS, Item, TaskData
from saisa_jax.testing import benchmarks

LLAVA = (
    *("vqav2", "gqa", "vizwiz", "textvqa", "textvqa_ocr", "textvqa_no_ocr", "pope", "mme", "scienceqa_img"),
    *("seed_bench", "mmbench", "mmbench_cn", "mmvet", "llava_bench", "mmvp"),
)
HUB = (*LLAVA, "mmmu", "mmstar", "cv_bench", "ocrbench")
UNSCORED = ("mmvet", "llava_bench")
S, C = benchmarks.S, benchmarks.C


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return benchmarks.write_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return benchmarks.write_hub(tmp_path_factory.mktemp("hub"))


def items_of(name: str, folder: Path, school: str = "llava") -> list[Item]:
    return read_items(TASKS[name].under(school), TaskData(str(folder), prompts=school, task=name))


def lines(items: list[Item]) -> list[dict[str, Any]]:
    return [
        {"id": item.id, "images": [], "image": None, "question": item.question, "kind": item.kind}
        | {"answers": list(item.answers), "extra": dict(item.extra)}
        for item in items
    ]  # fmt: skip


@pytest.mark.parametrize("school", SCHOOLS)
@pytest.mark.parametrize(("layout", "name"), [*(("llava", n) for n in LLAVA), *(("hub", n) for n in HUB)])
def test_right_answers_are_right(layout: str, name: str, school: str, llava: Path, hub: Path) -> None:
    """From file to record, a model that knows all answers: 100%, wherever the answers are known."""
    folder = llava if layout == "llava" else hub
    task, items = TASKS[name].under(school), items_of(name, folder, school)
    assert 8 <= len(items) <= 12 and all(item.images for item in items)
    rows = lines(items)
    for row, item in zip(rows, items, strict=True):
        row |= scoring.answered(task, item, item.answers[0] if item.answers else "red")
    record = scoring.summary(name, task, task.rescore(rows))
    files = task.files(rows, TaskData(str(folder), prompts=school, task=name))
    assert record["prompts"] == school and record["n"] == len(items)
    if name in UNSCORED or (layout == "llava" and name in ("vqav2", "vizwiz")):
        assert record["accuracy"] is None and "scored" in record["note"] and files
    else:
        assert record["accuracy"] == (pytest.approx(1)) and record["note"] == ""
        if name in ("gqa", "pope"):
            assert record["metrics"].get("mean f1", 1) == 1
        assert not record["headline"] or record["headline"] in record["metrics"] or name == "cv_bench"


PROMPTS = {
    # task, layout, school, number of the item: what is asked
    ("vqav2", "llava", "llava"): (1, f"what is the color of part 1?{S}"),
    ("gqa", "hub", "lmms"): (1, f"what is the color of part 1?{S}"),
    ("vizwiz", "llava", "lmms"): (
        1,
        f"What is the color of part 1?\nWhen the provided information is insufficient, respond with 'Unanswerable'.{S}",
    ),
    ("textvqa", "llava", "llava"): (1, f"what is the color of part 1?\nReference OCR token: STOP, 1{S}"),
    ("textvqa", "hub", "lmms"): (1, f"What is the color of part 1?{S}"),
    ("textvqa_ocr", "hub", "lmms"): (1, f"What is the color of part 1?\nReference OCR token: STOP, 1{S}"),
    ("textvqa_no_ocr", "llava", "llava"): (1, f"what is the color of part 1?{S}"),
    ("pope", "llava", "lmms"): (1, f"Is there a dog 1 in the image?{S}"),
    ("mme", "hub", "llava"): (1, f"Is 1 so?{S}"),
    ("mme", "llava", "lmms"): (1, f"Is part 0 blue?{S}"),
    ("scienceqa_img", "llava", "llava"): (1, f"Context: N/A\nwhat is the color of part 1?\nA. red\nB. blue{C}"),
    ("scienceqa_img", "llava", "lmms"): (1, f"what is the color of part 1?\nA. red\nB. blue{C}"),
    ("scienceqa_img", "hub", "lmms"): (1, f"Context: Look.\nwhat is the color of part 1?\nA. red\nB. blue{C}"),
    ("seed_bench", "hub", "llava"): (0, f"what is the color of part 1?\nA. red\nB. blue\nC. x\nD. y{C}"),
    ("mmbench", "llava", "llava"): (2, f"Look.\nwhat is the color of part 1?\nA. red\nB. blue{C}"),
    ("mmbench", "hub", "lmms"): (
        2, f"Look. what is the color of part 1? There are several options:\nA. red\nB. blue\n{C}",
    ),
    ("mmbench_cn", "hub", "lmms"): (
        0,
        "nan what is the color of part 0? There are several options:\nA. red\nB. blue\n\n"
        "请直接使用所提供的选项字母作为答案回答。",
    ),
    ("mmbench_cn", "llava", "llava"): (1, "what is the color of part 0?\nA. blue\nB. red\n请直接回答选项字母。"),
    ("mmmu", "hub", "llava"): (3, f"<image> <image>\nWhat is <image 1> beside <image 2>?\nA. red\nB. blue\n{C}"),
    ("mmmu", "hub", "lmms"): (3, f"What is\n<image>\nbeside\n<image>\n?\nA. red\nB. blue\n{C}"),
    ("mmstar", "hub", "lmms"): (1, f"what is the color of part 1?\nOptions: A: red, B: blue{C[:-1]}"),
    ("cv_bench", "hub", "lmms"): (
        1,
        "Note: You only need to respond with A, B without providing any additional information.\n\n"
        "what is the color of part 1?\n(A) 1\n(B) 2",
    ),
    ("mmvp", "llava", "lmms"): (1, f"what is the color of part 1?\nA. Red\nB. Blue{C}"),
    ("ocrbench", "hub", "llava"): (1, "what is written?"),
    ("mmvet", "llava", "lmms"): (
        1,
        "First please perform reasoning, and think step by step to provide best answer to the following question: "
        "\n\n"
        "what is the color of part 1?",
    ),
    ("llava_bench", "llava", "llava"): (1, "Describe it."),
}  # fmt: skip


@pytest.mark.parametrize(("name", "layout", "school"), PROMPTS)
def test_prompts(name: str, layout: str, school: str, llava: Path, hub: Path) -> None:
    number, question = PROMPTS[name, layout, school]
    assert items_of(name, llava if layout == "llava" else hub, school)[number].question == question


def test_mmbench_is_circular_and_writes_the_servers_table(llava: Path) -> None:
    """One wrong turn costs the question."""
    task, items = TASKS["mmbench"].under("llava"), items_of("mmbench", llava)
    rows = lines(items)
    for number, (row, item) in enumerate(zip(rows, items, strict=True)):
        row |= scoring.answered(task, item, "C" if number == 3 else f"{item.answers[0]}.")
    assert scoring.summary("mmbench", task, rows)["metrics"]["circular"] == 0.8
    files = task.files(rows, TaskData(str(llava), task="mmbench"))
    table = [line.split("\t") for line in files["upload.tsv"].decode().splitlines()]
    assert table[0] == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert table[4] == ["1000001", "what is the color of part 1?", "blue", "red", "", "", "C", "A", "dev"]
    path = llava / "sheet.xlsx"
    path.write_bytes(files["upload.xlsx"])
    with zipfile.ZipFile(path) as archive:
        sheet = archive.read("xl/worksheets/sheet1.xml").decode()
    path.unlink()
    assert sheet.count("<row>") == 11 and "<v>1000001</v>" in sheet and ">what is the color of part 1?</t>" in sheet


def test_uploads(llava: Path) -> None:
    """VQAv2's file has all questions of the test set; MM-Vet's and LLaVA-Bench's are as their judges take them."""
    found = {}
    for name in ("vqav2", "vizwiz", "mmvet", "llava_bench"):
        task, items = TASKS[name].under("llava"), items_of(name, llava)
        rows = lines(items)
        for row, item in zip(rows, items, strict=True):
            row |= scoring.answered(task, item, "The Dog's, two.")
        (text,) = task.files(rows, TaskData(str(llava), task=name)).values()
        found[name] = text.decode()
    vqa, vizwiz = json.loads(found["vqav2"]), json.loads(found["vizwiz"])
    assert vqa[0] == {"question_id": 0, "answer": "dog 's 2"} and vqa[-1] == {"question_id": 99, "answer": ""}
    assert len(vqa) == 11 and vizwiz[1] == {"image": "1.png", "answer": "dog 's 2"}
    assert json.loads(found["mmvet"])["v1_3"] == "The Dog's, two."
    first = json.loads(found["llava_bench"].splitlines()[0])
    assert (first["question_id"], first["prompt"], first["text"]) == (0, "Describe it.", "The Dog's, two.")


# --- Answers of other programs ---------------------------------------------------------------------------------------


def write(path: Path, rows: Any) -> str:
    text = json.dumps(rows) if isinstance(rows, dict) else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    return str(path)


def test_answers_of_other_programs(hub: Path, tmp_path: Path) -> None:
    """Of MMMU, in every form: 7 of 10 answers are right, one is a guess, which lmms-eval's log tells."""
    said = {item.id: item.answers[0] for item in items_of("mmmu", hub, "lmms")}
    first, second, third, *_ = said
    said |= {first: "C?", second: "A", third: "I do not know"}
    rows = [
        {"doc_id": n, "target": "A", "resps": [[text]], "filtered_resps": [text]}
        | {"mmmu_acc": {"id": name, "question_type": "multiple-choice", "answer": "A", "parsed_pred": ["B"]}}
        for n, (name, text) in enumerate(said.items())
    ]  # fmt: skip
    forms = {
        "samples_mmmu_val.jsonl": rows[::-1],
        "old.json": {"logs": [{key: row[key] for key in ("doc_id", "resps")} for row in rows]},
        "output.json": said,
        "TASK.jsonl": [{"id": name, "output": text, "score": 1.0} for name, text in said.items()],
        "llava.jsonl": [{"question_id": name, "text": text} for name, text in said.items()],
    }
    for form, content in forms.items():
        path, out = write(tmp_path / form, content), str(tmp_path / "out")
        record = answers.score_file("mmmu", path, out, data=str(hub))
        assert record["n"] == 10 and record["metrics"]["guessed"] == 2
        assert record["prompts"] == ("lmms" if form in ("samples_mmmu_val.jsonl", "old.json") else "llava")
        if form.startswith("samples"):  # both guesses are B there, and the third answer is A
            assert record["metrics"]["right"] == 7
        lines = (tmp_path / "out/evaluation/mmmu.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in lines] == list(said)
    with pytest.raises(DataError, match="is to a question of --data: its first has the id 'validation_Art_0'"):
        answers.score_file("pope", write(tmp_path / "x.json", said), out, data=str(hub))
    write(tmp_path / "cut.jsonl", rows)
    (tmp_path / "cut.jsonl").write_text((tmp_path / "cut.jsonl").read_text()[:-9])
    with pytest.raises(DataError, match=r"cut.jsonl, line 10: no JSON, or cut"):
        answers.score_file("mmmu", str(tmp_path / "cut.jsonl"), out, data=str(hub))
    with pytest.raises(DataError, match="two answers to question"):
        answers.score_file("mmmu", write(tmp_path / "two.jsonl", [*rows, rows[0]]), out, data=str(hub))
    part = answers.score_file("mmmu", write(tmp_path / "part.jsonl", rows[:8]), out, data=str(hub))
    assert part["n"] == 8 and len(part["failed"]) == 2  # counted, never scored


def test_a_log_of_mmmu_tells_its_questions(tmp_path: Path) -> None:
    """Without the benchmark's files: letters are read, and guesses are the log's."""
    told = [("A", "A", "A"), ("(B)", "A", "B"), ("none of them", "D", "D"), ("B.", "B", "B")]
    rows = [
        {"doc_id": n, "resps": [[text]], "mmmu_acc": {"id": f"validation_Art_{n}", "question_type": "multiple-choice"}
         | {"answer": right, "parsed_pred": [parsed]}} for n, (text, right, parsed) in enumerate(told)
    ]  # fmt: skip
    record = answers.score_file("mmmu", write(tmp_path / "log.jsonl", rows), str(tmp_path))
    assert (record["metrics"]["right"], record["metrics"]["guessed"], record["prompts"]) == (3, 1, "lmms")


def test_the_command(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {item.id: item.answers[0] for item in items_of("pope", hub)}
    path = write(tmp_path / "said.json", said)
    arguments = ["--tasks=pope", f"--answers={path}", f"--data={hub}", f"--output={tmp_path}", "--prompts=lmms"]
    assert eval_main(arguments) == 0
    out = capsys.readouterr().out
    assert "said.json on pope, prompts and scores of lmms" in out and "100.0%" in out
    assert json.loads((tmp_path / "evaluation/pope.json").read_text())["metrics"]["f1"] == 1
    for flags, message in (
        (["--tasks=pope,gqa"], "the one task that the answers are of"),
        (["--tasks=pope", "--checkpoint=m"], "leave out --checkpoint"),
    ):
        with pytest.raises(SystemExit):
            eval_main([*flags, f"--answers={path}"])
        assert message in capsys.readouterr().err
    assert eval_main(["--tasks=popes", f"--answers={path}"]) == 1
    assert "did you mean pope?" in capsys.readouterr().err


# --- What goes wrong -------------------------------------------------------------------------------------------------


def test_missing_files_are_named(llava: Path, hub: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"pope needs --data=DIR: put them there with `hf download lmms-lab-encoder/POPE"
    ):
        list(TASKS["pope"].items(TaskData(task="pope")))
    (tmp_path / "other").mkdir()
    with pytest.raises(
        DataError, match=r"holds no files of gqa: .*hf download .*or from LLaVA's eval.zip.*llava_gqa_testdev"
    ):
        items_of("gqa", tmp_path)
    copy = tmp_path / "gqa"
    shutil.copytree(llava / "gqa", copy)
    (copy / "data/testdev_balanced_questions.json").unlink()
    with pytest.raises(
        DataError, match=r"testdev_balanced_questions.json is missing, without which gqa cannot be asked"
    ):
        items_of("gqa", tmp_path)
    assert len(items_of("gqa", llava / "gqa")) == 10  # --data may be the benchmark's own folder
    shutil.copytree(llava / "pope", tmp_path / "pope")
    (tmp_path / "pope/val2014/0.png").unlink()
    with pytest.raises(DataError, match=r"6 of 12 questions of pope cannot be asked: 0 \(there is no image .*0.png"):
        items_of("pope", tmp_path)
    with (tmp_path / "pope/coco/coco_pope_random.json").open("a") as file:
        file.write('{"label": "yes"}\n')
    with pytest.raises(DataError, match=r"coco_pope_random.json has 5 labels for the 4 questions"):
        items_of("pope", tmp_path)


def test_parquet_files_that_do_not_do(hub: Path, tmp_path: Path) -> None:
    rows = [{"question_id": n, "question": "q", "image": benchmarks.picture(n), "category": "random"} for n in range(3)]
    benchmarks.write_parquet(tmp_path / "POPE/data/test-00000-of-00001.parquet", rows)
    with pytest.raises(DataError, match=r"has no column answer, which pope needs to score answers; it has question_id"):
        items_of("pope", tmp_path)
    answered = [{**row, "answer": "yes", "question_id": 1, "id": "1"} for row in rows]
    benchmarks.write_parquet(tmp_path / "POPE/data/test-00000-of-00001.parquet", answered)
    with pytest.raises(DataError, match="pope has two questions of one id: '1'"):
        items_of("pope", tmp_path)
    benchmarks.write_parquet(tmp_path / "textvqa/data/train-00000-of-00001.parquet", rows)
    with pytest.raises(DataError, match=r"holds train of textvqa, and none of the splits that are asked: validation"):
        items_of("textvqa", tmp_path)
    shard = tmp_path / "MMMU/data/validation-00000-of-00001.parquet"
    shard.parent.mkdir(parents=True)
    shard.write_bytes((hub / "MMMU/data/validation-00000-of-00001.parquet").read_bytes()[:-200])
    with pytest.raises(DataError, match=r"validation-00000-of-00001.parquet is not a Parquet file, or is cut"):
        items_of("mmmu", tmp_path)
    benchmarks.write_parquet(tmp_path / "OCRBench/test-00000-of-00002.parquet", rows)
    with pytest.raises(DataError, match="1 of 2 shards are missing"):
        items_of("ocrbench", tmp_path)
