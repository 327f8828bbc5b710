"""Tasks: one of one's own in a file, the task `source` on files of every form, and what cannot be asked."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from etils import epath
from PIL import Image

from saisa_jax.checkpoints import save_model
from saisa_jax.cli.eval import main as eval_main
from saisa_jax.config import ConfigError, from_saved, to_dict
from saisa_jax.data.sample import ASSISTANT, USER, DataError, Turn
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.evaluation import command, runner
from saisa_jax.evaluation.runner import evaluate
from saisa_jax.evaluation.settings import Settings
from saisa_jax.evaluation.tasks import TASKS, Item, TaskData
from saisa_jax.inference.model import VisionLanguageModel
from saisa_jax.models.saisa import init_params
from saisa_jax.testing import benchmarks
from saisa_jax.testing.configs import tiny_config

TOY = '''
import json
from pathlib import Path

from saisa_jax.evaluation.tasks import TASKS, Item, Task


def items(data):
    for line in Path(data.data).read_text().splitlines():
        row = json.loads(line)
        image = (Path(data.images) / row["image"]).read_bytes()
        yield Item(row["id"], row["ask"], tuple(row["right"]), (image,), kind=row["kind"], extra={"pair": row["pair"]})


def score(output, item):
    return len(output) % 4 / 3


def pairs(rows):
    """How many pairs of questions have no wrong one among them: no mean of items."""
    pairs = {}
    for row in rows:
        pairs.setdefault(row["extra"]["pair"], []).append(row["score"])
    return {"pairs": sum(min(scores) for scores in pairs.values())}


groups = {"odd": lambda row: row["kind"] == "odd"}
TASKS.register("toy")(Task("Toy", items, score, metric="length", metrics=pairs, groups=groups))
'''


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = tiny_config()
    directory = tmp_path_factory.mktemp("run") / "finetune" / "model"
    params = init_params(config.model_for("finetune"), jax.random.key(0))
    save_model(directory, params, config, load_tokenizer("easy_vqa"), {"stage": "finetune"})
    return str(directory)


@pytest.fixture(scope="module")
def model(checkpoint: str) -> VisionLanguageModel:
    return command.load(checkpoint)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (20, 20), color).save(folder / name)
    return folder


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(TASKS, "_entries", dict(TASKS))
    (tmp_path / "toy_task.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("toy_task")
    yield
    del sys.modules["toy_task"]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("toy")
def test_a_task_of_ones_own(
    checkpoint: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"id": f"q{n}", "ask": "is it red?", "right": ["yes", "yeah"], "image": "ab"[n % 2] + ".png", "pair": n // 2}
        | {"kind": ("even", "odd")[n % 2]}
        for n in range(6)
    ]
    data = write_lines(tmp_path / "questions.jsonl", rows)
    command.run(checkpoint, str(tmp_path / "out"), tasks=["toy"], data=data, images=str(pictures), limit=6)
    record = json.loads((tmp_path / "out" / "evaluation" / "toy.json").read_text())
    lines = read(tmp_path / "out" / "evaluation" / "toy.jsonl")
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    assert lines[0]["answers"] == ["yes", "yeah"] and lines[0]["images"][0].startswith("bytes:")
    scores = [len(line["output"]) % 4 / 3 for line in lines]
    assert [line["score"] for line in lines] == scores
    assert record["accuracy"] == sum(scores) / 6 and record["groups"]["odd"]["n"] == 3
    assert record["metrics"]["pairs"] == sum(min(scores[n : n + 2]) for n in (0, 2, 4))
    assert record["metric"] == "length" and record["title"] == "Toy" and record["settings"]["data"] == data
    assert len({tuple(line["images"]) for line in lines}) == 2
    out = capsys.readouterr().out
    assert "length" in out and "pairs" in out and "all tasks" not in out
    assert record["decoding"] == {
        **{"method": "greedy", "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 2, "dtype": "float32"},
        **{"template": "vicuna_v1", "system_prompt": None},
    }

    data = write_lines(tmp_path / "samples.jsonl", [llava(0, "a.png", "yes"), llava(1, "b.png", "no")])
    command.run(checkpoint, str(tmp_path / "out"), tasks=["source"], data=data, images=str(pictures))
    assert "all tasks" in capsys.readouterr().out  # of this command's and those before it
    summary = json.loads((tmp_path / "out" / "evaluation" / "summary.json").read_text())
    assert [(task["task"], task["n"], task["complete"]) for task in summary["tasks"]] == [
        ("source", 2, False),
        ("toy", 6, False),
    ]
    assert summary["checkpoint"] == checkpoint and summary["tasks"][1]["interval"] == record["interval"]
    pasted = (tmp_path / "out" / "evaluation" / "summary.md").read_text().splitlines()
    low, high = (100 * bound for bound in record["interval"])
    assert len(pasted) == 4 and pasted[3].startswith(
        f"| toy | length | {100 * record['accuracy']:.1f} | {low:.1f} to {high:.1f} | 6, the first | pairs "
    )


def llava(number: int, image: str, answer: str, *before: str) -> dict[str, Any]:
    said = [("human", f"<image>\n{before[0]}"), ("gpt", before[1]), ("human", "is it red?")] if before else []
    said = [*said, ("gpt", answer)] if before else [("human", "<image>\nis it red?"), ("gpt", answer)]
    return {"id": f"s{number}", "image": image, "conversations": [{"from": f, "value": v} for f, v in said]}


def test_a_source_of_every_form(model: VisionLanguageModel, pictures: Path, tmp_path: Path) -> None:
    rows = [
        llava(0, "a.png", "yes"),
        llava(1, "b.png", "2", "what color is the shape?", "blue"),
        llava(1, "b.png", "a"),
    ]
    data = write_lines(tmp_path / "samples.jsonl", rows)
    items = list(TASKS["source"].items(TaskData(data, str(pictures))))
    assert [item.id for item in items] == ["s0", "s1", "s1 (2)"]
    assert [item.kind for item in items] == ["yes/no", "number", "other"]
    assert items[1].question == "is it red?" and items[1].answers == ("2",)
    assert items[1].before == (Turn(USER, "<image>\nwhat color is the shape?"), Turn(ASSISTANT, "blue"))

    record = evaluate(model, "source", Settings(data=data, images=str(pictures)), epath.Path(tmp_path), "m")
    lines = read(tmp_path / "evaluation" / "source.jsonl")
    assert "blue" in lines[1]["prompt"] and lines[1]["prompt"].endswith("red? assistant:") and record["n"] == 3
    assert 0 <= record["metrics"]["vqa_score"] <= 1 and record["baseline"] == {}

    chat = [
        {"messages": [{"role": "user", "content": "is it red?"}, {"role": "assistant", "content": "no"}]}
        | {"image": "b.png"}
    ]
    (tmp_path / "chat.json").write_text(json.dumps(chat))
    (item,) = TASKS["source"].items(TaskData(str(tmp_path / "chat.json"), str(pictures)))
    assert isinstance(item, Item) and item.answers == ("no",) and item.images == (str(pictures / "b.png"),)


def test_a_source_takes_the_recipes_validation(model: VisionLanguageModel) -> None:
    validation = model.config.finetune.validation
    items = list(TASKS["source"].items(TaskData(validation=validation, stage="finetune")))
    assert len(items) > 1500 and len({item.id for item in items}) == len(items)  # each question on its own
    assert all(isinstance(item, Item) and not item.before for item in items)
    with pytest.raises(ConfigError, match=r"pretrain\.validation is empty; name a file of samples with --data=FILE"):
        list(TASKS["source"].items(TaskData(stage="pretrain")))


def test_missing_pictures_are_counted_and_few_are_named(
    model: VisionLanguageModel, pictures: Path, tmp_path: Path
) -> None:
    rows = [llava(n, "a.png" if n < 10 else f"gone{n}.png", "yes") for n in range(40)]
    data = write_lines(tmp_path / "samples.jsonl", rows)
    with pytest.raises(DataError, match=r"30 of 40 questions of source cannot be asked: s10 .*27 more.*--images") as e:
        evaluate(model, "source", Settings(data=data, images=str(pictures)), epath.Path(tmp_path / "out"), "m")
    assert len(str(e.value)) < 700 and not (tmp_path / "out").exists()


def test_a_broken_picture_is_written_down_and_never_scored(
    model: VisionLanguageModel, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "broken.png").write_bytes((pictures / "a.png").read_bytes()[:40])
    rows = [llava(0, "a.png", "yes"), llava(1, "broken.png", "yes"), llava(2, "b.png", "yes")]
    rows.append(llava(3, "a.png", "yes", "is it red? " * 60, "no"))  # too long for the model
    data = write_lines(tmp_path / "samples.jsonl", rows)
    settings = Settings(batch_size=2, data=data, images=str(pictures))
    record = evaluate(model, "source", settings, epath.Path(tmp_path), "m")
    lines = read(tmp_path / "evaluation" / "source.jsonl")
    assert [line["score"] is None for line in lines] == [False, True, False, True]
    assert record["failed"].keys() == {"s1", "s3"} and record["n"] == 2
    assert "cannot read" in lines[1]["error"] and "max_length" in lines[3]["error"]
    with pytest.raises(DataError, match="none of the 1 questions of source could be asked: s1"):
        write_lines(tmp_path / "samples.jsonl", rows[1:2])
        evaluate(model, "source", settings, epath.Path(tmp_path / "none"), "m")


def test_other_questions_under_the_same_ids_are_asked_anew(model: VisionLanguageModel, pictures: Path) -> None:
    items = [Item("a", "is it red?", ("yes",)), Item("a", "is it red?", ("no",))]
    one, other = (runner._identity(model, "toy", [item], Settings()) for item in items)
    assert one != other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ["easy_vqa"], "data": "x.json"}, r"--data=x\.json: easy_vqa asks the questions of the package"),
        ({"tasks": ["source"], "images": "x"}, "--images=x needs --data=FILE"),
        ({"tasks": ["source"], "data": "gone.json"}, r"--data=gone\.json: there is no such file or folder"),
    ],
)
def test_wrong_places(
    arguments: dict[str, Any], message: str, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, DataError), match=message):
        command.run(checkpoint, str(tmp_path / "out"), **arguments)
    assert not (tmp_path / "out").exists()


def test_a_recipe_without_tasks_lists_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, tasks=()))
    bare = VisionLanguageModel({}, config, None, "finetune", {})
    monkeypatch.setattr(command, "load", lambda directory, quantize=None: bare)
    with pytest.raises(ConfigError, match=r"--tasks=NAME,NAME from cv_bench, drawings, easy_vqa, .*, source, textvqa"):
        command.run("m", str(tmp_path))


def test_a_saved_configuration_of_before_loads() -> None:
    saved = to_dict(tiny_config())
    saved["evaluation"] = {"task": "easy_vqa", "batch_size": 8, "max_new_tokens": 2, "limit": 8}
    assert from_saved(saved).evaluation == tiny_config().evaluation
    for stage in ("pretrain", "finetune"):  # the benchmark was the default of every recipe
        saved[stage] = {**saved[stage], "sources": [{"format": "llava", "path": "a.json"}], "validation": []}
    assert from_saved(saved).evaluation.tasks == ()


def test_eval_runs_every_benchmark(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One command over all of them, the files of the Hub below one folder; what a server scores is written for it."""
    data, out = benchmarks.write_hub(tmp_path / "hub"), tmp_path / "out"
    names = [name for name in TASKS if name not in ("drawings", "easy_vqa", "source")]  # which have files of their own
    arguments = [f"--checkpoint={checkpoint}", f"--tasks={','.join(names)}", f"--data={data}", f"--output={out}"]
    assert eval_main([*arguments, "--max_new_tokens=2", "--limit=2", "--batch_size=2"]) == 0
    printed = capsys.readouterr().out
    for name in names:
        record = json.loads((out / "evaluation" / f"{name}.json").read_text())
        assert record["prompts"] == "llava" and record["n"] + len(record["failed"]) == 2
        assert all((out / "evaluation" / file).exists() for file in record["files"])
    assert "mmvet.upload.json" in printed and "MM-Vet's notebook" in printed
    assert (out / "evaluation" / "mmbench.upload.xlsx").exists()
