"""Flamingo's two stages: what trains, where it starts, and that it resumes to the bit."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from saisa_jax.checkpoints import load_model, save_model
from saisa_jax.config import TRAIN_ADAPTERS, TRAIN_PROJECTOR, Config, ConfigError, LoraConfig
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.models.saisa import abstract_params, init_params
from saisa_jax.testing.configs import tiny_config
from saisa_jax.testing.runs import timeless_rows
from saisa_jax.training import loop
from saisa_jax.training.optimizer import assign_groups, flatten
from saisa_jax.training.start import check_projectors


def params_of(directory: Path) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten(load_model(str(directory))[0]).items()}


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A model of another alignment, as an import is: it has one projector and no cross layers."""
    config = tiny_config("llava")
    params = jax.jit(init_params, static_argnums=0)(config.model, jax.random.key(3))
    save_model(epath.Path(tmp_path / "start"), params, config, load_tokenizer("easy_vqa"), {"stage": "finetune"})
    return tmp_path / "start"


def stage_1(start: Path) -> Config:
    config = tiny_config("casa")
    return dataclasses.replace(
        config,
        stages=("pretrain",),
        init_from=str(start),
        pretrain=dataclasses.replace(config.pretrain, groups=TRAIN_PROJECTOR),
        training=dataclasses.replace(config.training, eval_every=0),
    )


def test_stage_1_trains_what_joins_decoder_and_encoder(start: Path, tmp_path: Path) -> None:
    assert loop.run(stage_1(start), epath.Path(tmp_path / "whole")) == 0
    before, after = params_of(start), params_of(tmp_path / "whole" / "pretrain" / "model")
    as_stored = lambda x: np.asarray(jax.numpy.asarray(x).astype("bfloat16"))  # noqa: E731
    for path, leaf in before.items():
        if path.startswith("visual_proj/"):
            assert not np.array_equal(leaf, after[path]), path
        else:
            assert np.array_equal(as_stored(leaf), after[path]), path
    crossed = {path: leaf for path, leaf in after.items() if path not in before}
    assert crossed and all(path.startswith("cross_layers/") for path in crossed)
    assert all(np.abs(crossed[f"cross_layers/{gate}"]).min() > 0 for gate in ("attn_gate", "mlp_gate"))


@pytest.mark.slow
def test_stage_1_resumes_to_the_bit(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, whole, stopped = stage_1(start), epath.Path(tmp_path / "whole"), epath.Path(tmp_path / "stopped")
    assert loop.run(config, whole) == 0
    original, calls = loop.parallel.to_device, []

    def to_device(*args: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(loop.parallel, "to_device", to_device)
    assert loop.run(config, stopped) == signal.SIGTERM
    assert loop.run(config, stopped) == 0
    rows = [timeless_rows(Path(workdir) / "pretrain") for workdir in (stopped, whole)]
    assert [row for row in rows[0] if row["kind"] == "train"] == [row for row in rows[1] if row["kind"] == "train"]
    resumed, expected = (params_of(tmp_path / name / "pretrain" / "model") for name in ("stopped", "whole"))
    assert all(np.array_equal(resumed[path], leaf) for path, leaf in expected.items())


def test_stage_2_alone_wants_trained_cross_layers(start: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(stage_1(start), stages=("finetune",), allow_random_init=False)
    with pytest.raises(ConfigError, match=r"random projectors or cross layers: --config.init_from=.* holds no cross"):
        check_projectors(config, epath.Path(tmp_path))


def test_adapters_are_the_decoders_and_cross_layers_train_beside_them() -> None:
    config = tiny_config("flamingo")
    finetune = dataclasses.replace(config.finetune, groups=TRAIN_ADAPTERS, lora=LoraConfig(rank=2))
    model = dataclasses.replace(config, finetune=finetune).trained_model("finetune")
    rows = assign_groups(abstract_params(model), TRAIN_ADAPTERS)
    assert {path.split("/")[0] for path, row in rows.items() if row == 0} == {"layers"}
    assert {path.split("/")[0] for path, row in rows.items() if row == 1} == {"visual_proj", "cross_layers"}
