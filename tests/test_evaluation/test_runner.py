"""The runner and `eval.py`, on a model that only pretends."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from rich.console import Console

from saisa_jax import flops
from saisa_jax.checkpoints import CheckpointError
from saisa_jax.config import Config, ConfigError, DistributedConfig
from saisa_jax.data.sample import Turn
from saisa_jax.data.sources.easy_vqa import majority_baseline
from saisa_jax.data.text.conversation import Encoded
from saisa_jax.errors import UserError
from saisa_jax.evaluation import command, runner, scoring
from saisa_jax.evaluation.progress import Progress
from saisa_jax.evaluation.runner import Interrupted, evaluate
from saisa_jax.evaluation.settings import Settings
from saisa_jax.evaluation.tasks import TASKS, Item, TaskData
from saisa_jax.inference.model import Conversation, VisionLanguageModel
from saisa_jax.testing.configs import tiny_config

ROOT = Path(__file__).parents[2]
TASK = TASKS["easy_vqa"]


@functools.cache
def questions() -> list[Item]:
    return list(TASK.items(TaskData()))


@functools.cache
def truths() -> dict[tuple[str, Any], str]:
    return {(item.question, item.images[0]): item.answers[0] for item in questions()}


class Tokenizer:
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids))


@dataclasses.dataclass(frozen=True)
class Pretender(VisionLanguageModel):
    """Says the truth, with a capital and a full stop, except about images whose number ends in 7."""

    params: Any = None
    config: Config = dataclasses.field(default_factory=tiny_config)
    tokenizer: Tokenizer = dataclasses.field(default_factory=Tokenizer)
    stage: str = "finetune"
    metadata: dict[str, Any] = dataclasses.field(default_factory=lambda: {"stage": "finetune", "steps": 3})
    batches: list[list[str]] = dataclasses.field(default_factory=list)
    stop_after: int | None = None

    def prompt(
        self,
        turns: Sequence[Turn],
        views: Sequence[int],
        max_new_tokens: int = 0,
        name: str = "",
        system: str | None = None,
    ) -> Any:
        tokens = np.arange(len(turns[-1].text.split()), dtype=np.int32)
        weights, nothing = np.zeros(len(tokens), np.float32), np.zeros(0, np.int32)
        return Encoded(turns[-1].text, tokens, tokens, weights, tokens, nothing, len(tokens), tuple(views))

    def check_sees(self, images: Any, name: str) -> None:
        pass

    def text(self, tokens: Any) -> str:
        return tokens

    def answer_batches(self, prompts: Any, batches: Any, *rest: Any) -> Iterator[list[str | None]]:
        for batch in batches:
            if len(self.batches) == self.stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            asked = [None if n is None else (prompts[n].encoded.sample_id, *prompts[n].images) for n in batch]
            self.batches.append([question[0] for question in asked if question])
            yield [question and self.says(*question) for question in asked]

    def says(self, question: str, image: str) -> str:
        if image.endswith("7.png"):
            return "something else"
        return f"{truths()[question, image].capitalize()}. "

    def answer(self, conversations: Sequence[Conversation], *rest: Any, **named: Any) -> list[str]:
        return [self.says(asked.turns[-1].text, asked.images[0]) for asked in conversations]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_evaluation(tmp_path: Path) -> None:
    model = Pretender()
    record = evaluate(model, "easy_vqa", Settings(batch_size=64, limit=500), epath.Path(tmp_path / "out"), "some/model")
    folder = tmp_path / "out" / "evaluation"
    assert sorted(path.name for path in folder.iterdir()) == ["easy_vqa.json", "easy_vqa.jsonl"]
    assert json.loads((folder / "easy_vqa.json").read_text()) == record

    rows = read(folder / "easy_vqa.jsonl")
    items = questions()[:500]
    assert [row["id"] for row in rows] == [item.id for item in items]
    assert [row["score"] for row in rows] == [float(not item.images[0].endswith("7.png")) for item in items]
    assert rows[0].keys() >= {"id", "image", "question", "prompt", "output", "prediction", "answers", "score", "kind"}
    right = [row for row in rows if row["score"] == 1]
    assert record["accuracy"] == len(right) / 500 and record["n"] == 500 and not record["complete"]
    assert all([row["prediction"]] == row["answers"] for row in right)

    # All batches but the last are full.
    assert [len(batch) for batch in model.batches] == [64] * 7 + [500 % 64]

    groups, kinds = record["groups"], record["kinds"]
    assert groups["yes_no"]["n"] + groups["other"]["n"] == 500 == sum(part["n"] for part in kinds.values())
    assert record["other"] == groups["other"]["accuracy"]
    assert kinds.keys() == {row["kind"] for row in rows}
    low, high = record["interval"]
    plain = record["overall"]["interval_if_independent"]
    assert low < plain[0] < record["accuracy"] < plain[1] < high  # whole images are wrong here

    assert record["baseline"] == dataclasses.asdict(majority_baseline())
    mean = sum(row["prompt_tokens"] for row in rows) / 500
    assert record["prompt_tokens"] == pytest.approx(mean)
    assert (
        record["prefill_flops"]["decoder"]
        == flops.prefill(model.model_config, round(mean), 1, convention="decoder").total
    )
    assert record["model"]["alignment"] == "saisa" and record["stage"] == "finetune" and record["versions"]["jax"]


def test_all_questions_are_the_test_set() -> None:
    items = questions()
    assert len(items) == 9673 == len({item.id for item in items})
    assert sum(TASK.groups["yes_no"]({"kind": item.kind}) for item in items) / 9673 == pytest.approx(0.738, abs=1e-3)
    assert TASK.baseline(TaskData())["overall"] == pytest.approx(0.670, abs=1e-3)


def test_a_stopped_run_leaves_marked_answers_and_the_former_evaluation(tmp_path: Path) -> None:
    out = epath.Path(tmp_path)
    former = evaluate(Pretender(), "easy_vqa", Settings(batch_size=8, limit=8), out, "m")
    before = signal.getsignal(signal.SIGTERM)
    message = r"stopped after 64 of 100 .*easy_vqa\.partial\.jsonl.*goes on"
    with pytest.raises(Interrupted, match=message) as caught, command.Stop():
        evaluate(Pretender(stop_after=2), "easy_vqa", Settings(batch_size=32, limit=100), out, "m")
    assert isinstance(caught.value.__cause__, command.Terminated)
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(read(tmp_path / "evaluation" / "easy_vqa.partial.jsonl")) == 1 + 64
    assert json.loads((tmp_path / "evaluation" / "easy_vqa.json").read_text()) == former
    assert len(read(tmp_path / "evaluation" / "easy_vqa.jsonl")) == 8


def fill_disk(path: Any, text: str) -> None:
    Path(path).write_bytes(text[: len(text) // 2].encode())
    raise OSError("the disk is full")


@pytest.mark.parametrize("batch_size", [None, 12])
def test_the_same_evaluation_goes_on_and_another_does_not(
    batch_size: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with another `batch_size`, of which no answer depends."""
    settings, whole, folder = Settings(batch_size=32, limit=100), Pretender(), tmp_path / "evaluation"
    partial = folder / "easy_vqa.partial.jsonl"
    evaluate(whole, "easy_vqa", settings, epath.Path(tmp_path / "whole"), "m")

    def stop() -> None:
        with pytest.raises(Interrupted), command.Stop():
            evaluate(Pretender(stop_after=2), "easy_vqa", settings, epath.Path(tmp_path), "m")

    stop()
    with partial.open("a") as file:
        file.write(partial.read_text().splitlines()[-1][:40])  # a kill in the middle of a line
    for changed in (
        Pretender(config=dataclasses.replace(tiny_config(), name="other")),
        Pretender(params={"x": np.zeros(1, np.float32)}),
    ):
        header = {"of": runner._identity(changed, "easy_vqa", questions()[:100], settings)}
        assert runner._answered_before(epath.Path(partial), header) == {}
    of_another_process = dataclasses.replace(tiny_config(), distributed=DistributedConfig("host:1", 2, 1))
    both = [
        runner._identity(m, "easy_vqa", questions()[:9], settings)
        for m in (Pretender(), Pretender(config=of_another_process))
    ]
    assert both[0] == both[1]
    assert caplog.text.count("is of another model, other questions or other settings") == 2
    left = partial.read_text()
    with monkeypatch.context() as disk, pytest.raises(OSError, match="full"):
        disk.setattr(type(epath.Path(partial)), "write_text", fill_disk)  # while the next start writes it again
        evaluate(Pretender(), "easy_vqa", settings, epath.Path(tmp_path), "m")
    assert partial.read_text() == left
    rest = Pretender()
    if batch_size is None:
        evaluate(rest, "easy_vqa", settings, epath.Path(tmp_path), "m")
        assert rest.batches == whole.batches[2:] and len(whole.batches) == 4
    else:
        evaluate(rest, "easy_vqa", dataclasses.replace(settings, batch_size=batch_size), epath.Path(tmp_path), "m")
        assert 100 - 64 <= sum(map(len, rest.batches)) < 100 - 64 + batch_size
    answers = (place / "evaluation" / "easy_vqa.jsonl" for place in (tmp_path, tmp_path / "whole"))
    assert next(answers).read_bytes() == next(answers).read_bytes()
    assert not partial.exists()

    stop()
    every = Pretender()
    evaluate(every, "easy_vqa", Settings(batch_size=32, limit=99), epath.Path(tmp_path), "m")
    assert len(every.batches) == 4


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"limit": 0}, {"max_new_tokens": 0}])
def test_bad_settings_name_their_flag(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"--{next(iter(bad))}=0 must be at least 1"):
        Settings(**bad)


def test_unknown_task() -> None:
    with pytest.raises(UserError, match=r"tasks='easy_vqaa' is not one of .*source, .*; did you mean easy_vqa\?"):
        TASKS["easy_vqaa"]


def test_table_and_progress() -> None:
    console = Console(record=True, width=100, force_terminal=False)
    with Progress("easy_vqa", 20, console) as progress:
        progress.update(10, 9)
        progress.update(10, 9)
    part = {"accuracy": 0.9, "interval": [0.85, 0.93], "n": 20}
    record = {"task": "easy_vqa", "n": 20, "complete": False, "model": {"name": "demo"}, "overall": part}
    record |= {"metric": "exact match", "metrics": {"f1": 0.5}, "failed": {}}
    record |= {"groups": {"yes_no": part}, "kinds": {"color": part}, "baseline": {"overall": 0.67, "yes_no": 0.825}}
    console.print(command.table(record))
    text = console.export_text()
    assert "easy_vqa: 90.0% right, " in text and "/s, 20 of 20 questions" in text
    assert "demo on easy_vqa, the first 20 questions" in text
    assert "85.0% to 93.0%" in text and "82.5%" in text and "yes/no" in text and "0.5" in text


def test_what_an_earlier_start_answered_says_nothing_about_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("saisa_jax.evaluation.progress.time.monotonic", lambda: now[0])
    progress = Progress("easy_vqa", 1000, Console(record=True, force_terminal=False), before=(900, 450.0))
    now[0] = 20.0
    progress.update(10, 10.0)
    assert progress.seconds_left == pytest.approx(2.0 * 90)
    assert "easy_vqa: 50.5% right, 0.5/s, 910 of 1000 questions, 3 min 0 s left" in progress._console.export_text()


def test_progress_bar_on_a_terminal() -> None:
    console = Console(force_terminal=True, width=100, record=True)
    with Progress("easy_vqa", 4, console) as progress:
        progress.update(4, 3)
    text = console.export_text()
    assert "75.0% right" in text and "4/4" in text


def test_the_last_finished_stage_is_evaluated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--workdir=.* holds no finished model.*python train\.py"):
        command.model_of(str(tmp_path))
    (tmp_path / "pretrain" / "model").mkdir(parents=True)
    assert command.model_of(str(tmp_path)) == str(tmp_path / "pretrain" / "model")
    (tmp_path / "finetune" / "model").mkdir(parents=True)
    assert command.model_of(str(tmp_path)) == str(tmp_path / "finetune" / "model")


def test_run_and_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "load", lambda directory, **placed: Pretender())
    command.run("some/model", str(tmp_path), limit=10, batch_size=5)
    assert "easy_vqa.json with the answers" in capsys.readouterr().out
    assert json.loads((tmp_path / "evaluation" / "easy_vqa.json").read_text())["settings"]["max_new_tokens"] > 0
    item = next(item for item in questions() if not item.images[0].endswith("7.png"))
    assert command.ask("some/model", item.question, [str(item.images[0])]) == f"{item.answers[0].capitalize()}. "


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name either --workdir=RUN or --checkpoint=MODEL"),
        (["--workdir=a", "--checkpoint=b"], "name either --workdir=RUN or --checkpoint=MODEL"),
        (["--checkpoint=b", "--image=c.png"], "--image needs --question"),
        (["--checkpoint=b", "--question=c", "--tasks=easy_vqa"], "--question is asked instead of a benchmark"),
        (["--checkpoint=b", "--tasks=source", "--images=c"], "--images=c needs --data=FILE"),
    ],
)
def test_bad_flags(arguments: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, "eval.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_bad_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tasks='vqa' is not one of cv_bench"):
        command.run(str(tmp_path / "nowhere"), str(tmp_path / "out"), tasks=["vqa"])
    with pytest.raises(CheckpointError, match="nowhere"):
        command.run(str(tmp_path / "nowhere"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_nothing_half_written(tmp_path: Path) -> None:
    out = epath.Path(tmp_path)
    scoring.commit(out, "toy", [{"id": 1}], {"n": 1})
    with pytest.raises(TypeError):
        scoring.commit(out, "toy", [{"id": 2}], {"n": object()})
    assert json.loads((tmp_path / "toy.json").read_text()) == {"n": 1}
