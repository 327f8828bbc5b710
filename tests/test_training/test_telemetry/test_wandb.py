"""Weights & Biases, by a stand-in of its module."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
from etils import epath

from saisa_jax.config import ConfigError
from saisa_jax.training.telemetry.metrics import MetricsWriter
from saisa_jax.training.telemetry.wandb import WandbLog, check_wandb


class StandIn:
    """Keeps what it is told."""

    def __init__(self):
        self.started, self.logged, self.metrics, self.finished = [], [], [], 0
        self.__spec__ = SimpleNamespace()

    def init(self, **settings):
        self.started.append(settings)
        return self

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, numbers):
        self.logged.append(numbers)

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def log(tmp_path, stage="finetune"):
    return WandbLog("llms", epath.Path(tmp_path) / "run" / stage, {"seed": 3})


def test_it_gets_the_numbers_of_the_rows(tmp_path, wandb):
    with MetricsWriter(tmp_path / "run" / "finetune", tensorboard=False, wandb=log(tmp_path)) as writer:
        writer.write("train", 4, loss=0.5, nan=float("nan"), ok=True)
        writer.write("eval", 4, loss=0.75, samples=[{"id": "a"}])
    assert wandb.logged == [{"step": 4, "train/loss": 0.5}, {"step": 4, "eval/loss": 0.75}]
    assert wandb.metrics == [("step", None), ("*", "step")] and wandb.finished == 1
    (settings,) = wandb.started
    assert settings["project"] == "llms" and settings["name"] == "run/finetune" and settings["group"] == "run"
    assert settings["config"] == {"seed": 3} and settings["dir"] == str(tmp_path / "run" / "finetune")


def test_a_stage_goes_on_in_its_own_run(tmp_path, wandb):
    for stage in ("pretrain", "finetune", "finetune"):
        log(tmp_path, stage).close()
    first, second, third = (settings["id"] for settings in wandb.started)
    assert first != second == third and wandb.started[2]["resume"] == "allow"


def test_what_it_refuses_is_told(tmp_path, wandb, monkeypatch):
    def init(**settings):
        raise RuntimeError("api_key not configured")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(ConfigError, match=r"api_key not configured; log in with .*WANDB_MODE=offline"):
        log(tmp_path)


def test_it_is_asked_for_only_where_it_is(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_wandb(None)
    with pytest.raises(ConfigError, match=r"--config.training.wandb=llms needs wandb: pip install wandb"):
        check_wandb("llms")
