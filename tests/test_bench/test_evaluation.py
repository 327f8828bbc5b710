"""The parts of an evaluation's time."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from saisa_jax.bench import evaluation
from saisa_jax.checkpoints import save_model
from saisa_jax.cli import bench_eval
from saisa_jax.config import ConfigError
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.models.saisa import init_params
from saisa_jax.testing.configs import tiny_config


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    config, seen, table = tiny_config(), [], evaluation.table
    params = init_params(config.model_for("finetune"), jax.random.key(1))
    save_model(tmp_path / "model", params, config, load_tokenizer("easy_vqa"), {"stage": "finetune"})
    monkeypatch.setattr(evaluation, "table", lambda timed: seen.append(timed) or table(timed))
    flags = [f"--checkpoint={tmp_path / 'model'}", "--limit=20", "--batch_size=8", "--max_new_tokens=4"]
    assert bench_eval.main(flags) == 0
    printed = capsys.readouterr().out
    assert "batches of 8 questions (given)" in printed and "questions/s" in printed and "as eval.py does it" in printed
    (timed,) = seen
    assert timed.questions == 20 and 0 < timed.tokens <= 80 and 0 <= timed.waited <= timed.seconds
    assert timed.parts.keys() == set(evaluation.PARTS) and all(seconds >= 0 for seconds in timed.parts.values())
    with pytest.raises(ConfigError, match="--limit=0 must be at least 1"):
        bench_eval.main([*flags, "--limit=0"])
