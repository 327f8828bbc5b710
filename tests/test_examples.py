"""The launch files of examples/ are YAML of the right kind, and their commands are ones that train.py reads."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from saisa_jax.cli.flags import read_config
from saisa_jax.config import Config

EXAMPLES = Path(__file__).parents[1] / "examples"


def recipe(command: Sequence[str]) -> Config:
    """What `python train.py ...` would train."""
    assert list(command[:2]) == ["python", "train.py"]
    workdir = [flag for flag in command if flag.startswith("--workdir=gs://")]
    assert len(workdir) == 1
    return read_config([flag for flag in command[2:] if flag not in workdir])


def check(config: Config) -> None:
    assert config.model.embed_dim == 4096 and config.init_from == "gs://BUCKET/checkpoints/vicuna_7b"
    assert config.data.tokenizer == f"{config.init_from}/tokenizer"
    for stage in config.stages:
        assert config.stage(stage).sources[0].path == f"gs://BUCKET/shards/{stage}"


def test_gke() -> None:
    document: Any = yaml.safe_load((EXAMPLES / "gke-jobset.yaml").read_text())
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = document["spec"]["replicatedJobs"]
    job = job["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    chips = job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    rows, columns = map(int, job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["completions"] == job["parallelism"] and chips == rows * columns
    config = recipe(container["command"])
    check(config)
    assert config.distributed.coordinator == "auto"


def test_skypilot() -> None:
    document = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())
    assert {"name", "resources", "envs", "workdir", "setup", "run"} == document.keys()
    check(recipe(shlex.split(document["run"].replace("\\\n", " ").replace("$BUCKET", "BUCKET"))))
