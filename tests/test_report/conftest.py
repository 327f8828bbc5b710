"""Run directories written by hand, and a model that only pretends."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saisa_jax import flops
from saisa_jax.config import Config, to_dict
from saisa_jax.data.sources import easy_vqa
from saisa_jax.evaluation import scoring
from saisa_jax.evaluation.tasks import TASKS, TaskData
from saisa_jax.testing.configs import tiny_config


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_stage(directory: Path, name: str, *, steps: int = 60, floor: float = 0.2, finished: bool = True) -> None:
    rng = np.random.default_rng(len(name))
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = floor + 3.5 * math.exp(-8 * step / steps)
        rows.append({"kind": "train", "step": step, "loss": loss * rng.uniform(0.7, 1.3), "lr": 1e-3, "seconds": step})
        if step % (steps // 6) == 0:
            rows.append({"kind": "eval", "step": step, "loss": loss, "samples": []})
    write_jsonl(directory / name / "metrics.jsonl", rows)
    if finished:
        summary = {"steps": steps, "samples": steps * 64, "wall_seconds": 251.0, "train_flops": 2.1e13}
        (directory / name / "summary.json").write_text(json.dumps(summary | {"parameters": 1_661_952}))
        (directory / name / "model").mkdir()


def write_evaluation(directory: Path, config: Config, *, accuracy: float = 0.9, questions: int = 400) -> None:
    rng = np.random.default_rng(config.seed)
    words = (*easy_vqa.COLORS, *easy_vqa.SHAPES)
    predictions = []
    for item in list(TASKS["easy_vqa"].items(TaskData()))[:questions]:
        right = rng.uniform() < accuracy
        (truth,) = item.answers
        wrong = {"yes": "no", "no": "yes"}.get(truth) or str(rng.choice([w for w in words if w != truth]))
        output = truth if right else wrong
        predictions.append(
            {"id": item.id, "image": item.images[0], "images": list(item.images), "question": item.question}
            | {"prompt": "", "prompt_tokens": 12, "output": output, "prediction": output, "answers": [truth]}
            | {"score": float(right), "kind": item.kind}
        )
    model = config.model_for("finetune")
    record = scoring.summary("easy_vqa", TASKS["easy_vqa"], predictions) | {
        "prompt_tokens": 11.7,
        "images_per_question": 1,
        "prefill_flops": {name: flops.prefill(model, 12, 1, convention=name).total for name in flops.CONVENTIONS},
        "stage": "finetune",
        "complete": True,
    }
    write_jsonl(directory / "evaluation" / "easy_vqa.jsonl", predictions)
    (directory / "evaluation" / "easy_vqa.json").write_text(json.dumps(record))


def write_run(
    directory: Path,
    alignment: str = "saisa",
    *,
    blind: bool = False,
    seed: int = 0,
    stages: tuple[str, ...] = ("pretrain", "finetune"),
    finished: bool = True,
    evaluated: bool = True,
    accuracy: float = 0.9,
    questions: int = 400,
) -> Path:
    """A run with the stages that have begun, the last of them perhaps not finished."""
    config = dataclasses.replace(tiny_config(alignment, blind=blind), seed=seed)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(to_dict(config)))
    for stage in stages:
        write_stage(directory, stage, finished=finished or stage != stages[-1])
    if evaluated:
        write_evaluation(directory, config, accuracy=accuracy, questions=questions)
    return directory


class FakeModel:
    """Attends to the middle of the image, more so in later layers."""

    def __init__(self, config: Config):
        self.config = config

    def attention(self, question: str, images: list[Any]) -> np.ndarray:
        side = self.config.model.vision.patches_per_side
        place = np.arange(side) - (side - 1) / 2
        weights = [
            np.exp(-(layer + 0.5) * 2 * (place[:, None] ** 2 + place**2) / side)
            for layer in range(self.config.model.num_layers)
        ]
        return np.stack([0.6 * weight.ravel() / weight.sum() for weight in weights]).astype(np.float32)


@pytest.fixture(autouse=True)
def coarse_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer pixels take less time."""
    monkeypatch.setattr("saisa_jax.report.plots.style.PIXELS_PER_INCH", 40)


@pytest.fixture
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model directory holds a FakeModel of its run's configuration."""

    def load(directory: str) -> FakeModel:
        from saisa_jax.report.runs import read_run

        return FakeModel(read_run(str(Path(directory).parents[1])).config)

    monkeypatch.setattr("saisa_jax.inference.model.load", load)


@pytest.fixture
def make_run() -> Callable[..., Path]:
    return write_run
