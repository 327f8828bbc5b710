"""The page of one evaluation's answers: what is on it, pictures within files, attention, and what is missing."""

from __future__ import annotations

import io
import json
import re
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from saisa_jax.__main__ import main
from saisa_jax.config import ConfigError
from saisa_jax.evaluation.runner import image_name
from saisa_jax.evaluation.tasks import TASKS, Item, Task
from saisa_jax.report import browse
from saisa_jax.testing.configs import tiny_config


def picture(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (300, 200), (shade, 90, 90)).save(out, "PNG")
    return out.getvalue()


ITEMS = [
    Item(
        f"q{n}", f"what is </script><b>{n}</b>?", ("cat", "cat", "dog"), (picture(n),), kind=("animal", "place")[n % 2]
    )
    for n in range(6)
]
SCORES = (1.0, 0.0, None, 0.3, 0.0, 1.0)


@pytest.fixture
def evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six answers about pictures that lie within a file: two right, two wrong, one partly right and one failed."""
    monkeypatch.setattr(TASKS, "_entries", {**TASKS, "toy": Task("Toy", lambda data: ITEMS, lambda output, item: 1.0)})
    rows = []
    for item, score in zip(ITEMS, SCORES, strict=True):
        asked = {"images": [image_name(image) for image in item.images], "kind": item.kind, "id": item.id}
        asked |= {"question": item.question, "answers": list(item.answers), "prompt": f"prompt {item.question}"}
        said: dict[str, Any] = {"output": "A fox.", "prediction": "fox", "score": score}
        if score is None:
            said = {"output": None, "prediction": None, "score": None, "error": "too long"}
        rows.append(asked | said)
    record = {"task": "toy", "title": "Toy", "metric": "exact match", "n": 5, "accuracy": 0.46, "interval": [0.2, 0.7]}
    record |= {"failed": {"q2": "too long"}, "model": {"name": "mine"}, "checkpoint": str(tmp_path / "model")}
    record |= {"stage": "finetune", "settings": {"data": "", "quantize": None}, "prompts": "llava", "finished": "today"}
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "toy.json").write_text(json.dumps(record))
    return folder / "toy.json"


class FakeModel:
    """Attends to the first patch; its prompts are those of the fixture, but of one question."""

    config = tiny_config()
    tokenizer = SimpleNamespace(decode=lambda tokens, skip_special_tokens: "".join(map(chr, tokens)))

    def prompt(self, turns: Any, views: list[int]) -> Any:
        text = turns[-1].text
        text = text if ITEMS[1].question == text else f"prompt {text}"
        return SimpleNamespace(tokens=np.array([ord(letter) for letter in text]))

    def attention(self, question: str, images: list[Any]) -> np.ndarray:
        return np.eye(2, 16, dtype=np.float32)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saisa_jax.inference.model.load", lambda source, quantize=None: FakeModel())


class Tags(HTMLParser):
    """Start tags of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.seen: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert not [value for name, value in attrs if name in ("src", "href")]


def data_of(page: Path) -> dict[str, Any]:
    html = page.read_text()
    assert "http" not in html and "url(" not in html
    assert Tags(html).seen.count("script") == 2  # whatever the questions say
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    return json.loads(found[1])


def image_of(source: str) -> Image.Image:
    kind, data = source.split(",", 1)
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(b64decode(data)))


@pytest.mark.usefixtures("fake")
def test_answers_with_their_pictures(evaluation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", f"--evaluation={evaluation}"]) == 0
    assert f"The answers are in {evaluation.with_suffix('.html')}" in capsys.readouterr().out
    data = data_of(evaluation.with_suffix(".html"))
    rows = {row["id"]: row for row in data["rows"]}
    assert [row["score"] for row in data["rows"]] == [None, 0.0, 0.0, 0.3, 1.0, 1.0]
    assert rows["q2"]["error"] == "too long" and rows["q2"]["output"] is None
    assert rows["q1"]["answers"] == ["cat (2)", "dog"] and rows["q1"]["parsed"] == "fox"
    assert rows["q1"]["question"] == "what is </script><b>1</b>?"
    for number, name in enumerate(rows):  # the pictures themselves, made small
        (index,) = rows[name]["images"]
        image = image_of(data["images"][index])
        shade = np.asarray(image)[..., 0].mean()
        assert image.size == (224, 149) and abs(shade - int(name[1])) < 3, number
    looked = {name for name in rows if "looked" in rows[name]}
    assert looked == {"q3", "q4"}  # not q1, whose prompt holds more than its question
    captions = [caption for caption, _ in rows["q3"]["looked"]]
    assert captions == ["the image", "layer 1: 100% on the image", "layer 2: 100% on the image"]
    assert image_of(rows["q3"]["looked"][1][1]).size == (browse.TILE, browse.TILE)
    lead = "Exact match (prompts: llava) 46.0%, 95% interval 20.0 to 70.0%, of 5 questions; 1 could not be asked."
    assert lead in evaluation.with_suffix(".html").read_text()


def test_answers_that_only_a_server_scores(evaluation: Path) -> None:
    lines = evaluation.with_suffix(".jsonl")
    rows = [json.loads(line) | {"score": None, "answers": []} for line in lines.read_text().splitlines()]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = json.loads(evaluation.read_text()) | {"accuracy": None, "interval": None, "note": "5 answers, not scored"}
    evaluation.write_text(json.dumps(record))
    assert main(["report", f"--evaluation={evaluation}", "--attention=0"]) == 0
    page = evaluation.with_suffix(".html")
    assert "5 answers, not scored (prompts" in page.read_text()
    assert [row["output"] for row in data_of(page)["rows"]].count("A fox.") == 5


def test_what_is_missing_is_said(
    evaluation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(browse, "MOST_ROWS", 3)
    monkeypatch.setattr(browse, "MOST_PICTURES", 2)
    assert main(["report", f"--evaluation={tmp_path}", f"--output={tmp_path / 'page'}"]) == 0  # there is no model
    out = capsys.readouterr().out
    assert "3 of 6 questions are on this page" in out and "1 of 3 pictures are not on this page: at most 2 are" in out
    assert "no attention is shown" in out
    data = data_of(tmp_path / "page" / "toy.html")
    assert [row["score"] for row in data["rows"]] == [None, 0.0, 0.0] and len(data["images"]) == 2

    def gone(data: Any) -> list[Item]:
        raise ConfigError("the file is gone")

    monkeypatch.setattr(TASKS, "_entries", {"toy": Task("Toy", gone, lambda output, item: 1.0)})
    assert main(["report", f"--evaluation={evaluation}", "--attention=0"]) == 0
    out = capsys.readouterr().out
    assert "the pictures of 3 questions are not there any more: the file is gone" in out and "attention" not in out
    assert data_of(evaluation.with_suffix(".html"))["images"] == []
    assert main(["report", f"--evaluation={tmp_path / 'nowhere'}"]) == 2
    assert "is neither a TASK.json nor a folder" in capsys.readouterr().err
