"""The page, from run directories that are complete, cut short, broken or several."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from saisa_jax.__main__ import main
from saisa_jax.report.plots import color
from saisa_jax.report.runs import read_run, read_runs

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Checker(HTMLParser):
    """Fails on tags that are not closed in order; notes tags, sources and text."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def check(page: Path) -> Checker:
    """A page in one piece: everything inside, every image an image."""
    html = page.read_text()
    checker = Checker(html)
    assert html.startswith("<!doctype html>") and "script" not in checker.tags and "link" not in checker.tags
    assert "http" not in html and "url(" not in html
    for source in checker.sources:
        kind, data = source.split(",", 1)
        assert kind == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data))).verify()
    return checker


@pytest.mark.usefixtures("fake_model")
def test_one_run(make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "demo")
    assert main(["report", "--workdir", str(run)]) == 0
    out = capsys.readouterr().out
    assert "accuracy" in out and str(run / "report" / "index.html") in out.replace("\n", "")

    page = check(run / "report" / "index.html")
    accuracy = json.loads((run / "evaluation" / "easy_vqa.json").read_text())["accuracy"]
    assert f"{accuracy:.1%}" in page.text and "SAISA on easy-VQA" in page.text and "67.0%" in page.text
    assert page.tags.count("article") == 12
    assert page.text.count("✗") == 3 and page.text.count("✓") == 9
    assert "layer 1: 60% on the image" in page.text and "layer 2: 60% on the image" in page.text
    assert "model.embed_dim = 32" in page.text
    files = {path.name for path in (run / "report").iterdir()}
    assert files == {
        *("index.html", "loss_pretrain.png", "loss_finetune.png", "accuracy_by_kind.png", "confusion.png"),
        *("accuracy_against_flops.png", "accuracy_against_decoder_flops.png", "flops_by_part.png"),
        *(f"attention_{number}.png" for number in (1, 2, 3)),
    }
    assert main(["report", "--workdir", str(run)]) == 0  # again, over the former one, and the same
    assert check(run / "report" / "index.html").text == page.text


@pytest.mark.usefixtures("fake_model")
def test_several_runs(make_run: Callable[..., Path], tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "blind", blind=True, accuracy=0.67),
        make_run(tmp_path / "saisa"),
        make_run(tmp_path / "saisa_again", seed=1),
        make_run(tmp_path / "llava", "llava", evaluated=False),
    ]
    times = {"first": [0.02, 0.04, 0.03], "second": [0.01, 0.01, 0.01], "load_before": 0.2, "load_after": 1.5}
    (tmp_path / "saisa" / "bench_image.json").write_text(json.dumps({"device": "cpu", "cores": 2} | times))
    assert main(["report", "--runs", ",".join(map(str, runs)), "--output", str(tmp_path / "report")]) == 0
    page = check(tmp_path / "report" / "index.html")
    for label in ("SAISA, blind", "SAISA, seed 1", "LLaVA"):
        assert label in page.text
    assert "LLaVA: not evaluated on easy_vqa yet: python eval.py --workdir=" in page.text
    assert "30 ms" in page.text and "second 10 ms" in page.text and "cpu, 2 cores, load at most 1.5" in page.text
    assert (tmp_path / "report" / "accuracy_against_seconds.png").exists()
    assert (tmp_path / "report" / "accuracy_against_training.png").exists()
    html = (tmp_path / "report" / "index.html").read_text()
    assert html.count(f"background:{color(1)}") == 2 and html.count(f"background:{color(2)}") == 1  # seeds look alike
    assert page.tags.count("article") == 12
    assert len(re.findall("[✓✗]", page.text)) == 36  # the answers of the three that were evaluated
    assert (tmp_path / "report" / "attention_1.png").exists()  # of the one that sees


def test_runs_of_one_label_get_their_directories_name(make_run: Callable[..., Path], tmp_path: Path) -> None:
    runs = read_runs([str(make_run(tmp_path / name, evaluated=False)) for name in ("first", "second")])
    assert [run.label for run in runs] == ["SAISA (first)", "SAISA (second)"]


def test_an_interrupted_run_gets_its_curves(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "cut", stages=("pretrain",), finished=False, evaluated=False)
    with (run / "pretrain" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # killed while it wrote
    assert main(["report", "--workdir", str(run)]) == 0
    page = check(run / "report" / "index.html")
    assert "Training SAISA" in page.text and "60, not finished" in page.text
    assert (run / "report" / "loss_pretrain.png").exists() and not (run / "report" / "loss_finetune.png").exists()
    out = capsys.readouterr().out
    assert f"pretrain and finetune not finished: python train.py --config=... --workdir={run}" in out
    assert f"not evaluated yet: python eval.py --workdir={run}" in out


def test_without_the_model_there_is_no_attention(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    assert main(["report", "--workdir", str(run)]) == 0  # the model's directories are empty
    page = check(run / "report" / "index.html")
    assert "no attention is shown" in page.text and page.tags.count("article") == 12
    for stage in ("pretrain", "finetune"):
        (run / stage / "model").rmdir()
    assert main(["report", "--workdir", str(run)]) == 0
    assert "holds no finished model" in check(run / "report" / "index.html").text


def test_an_evaluation_of_another_stage_is_pointed_out(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    path = run / "evaluation" / "easy_vqa.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stage": "pretrain", "complete": False}))
    first, second = read_run(str(run)).notices
    assert "the evaluation is of the model after pretrain" in first and "on the first 400 questions only" in second


@pytest.mark.usefixtures("fake_model")
def test_text_is_escaped(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(tmp_path / "a<b>&c")
    path = run / "evaluation" / "easy_vqa.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row |= {"question": '<script>alert("1")</script>', "output": "<b>&", "image": "/gone.png"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["report", "--workdir", str(run)]) == 0
    page = check(run / "report" / "index.html")  # no script among its tags
    assert 'alert("1")' in page.text and "no attention is shown" in page.text  # and images that are gone


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "it has no config.json. python train.py --config=... --workdir="),
        ({"config.json": "{}"}, "holds no training metrics yet. python train.py"),
        ({"config.json": "{"}, "is not JSON"),
        ({"config.json": '{"modle": {}}'}, "unknown config key modle"),
        ({"config.json": "{}", "pretrain/metrics.jsonl": "x\ny\n"}, "metrics.jsonl line 1 is not JSON"),
    ],
)
def test_nothing_to_report(
    files: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert main(["report", "--workdir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_several_runs_need_a_place(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", "--runs=a,b"])
    assert "--runs needs --output" in capsys.readouterr().err
