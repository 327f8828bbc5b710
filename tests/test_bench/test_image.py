"""`bench image` on a tiny, random model."""

from __future__ import annotations

import json

import jax

from saisa_jax import __main__ as main
from saisa_jax.checkpoints import save_model
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.models.saisa import init_params
from saisa_jax.testing.configs import tiny_config


def test_the_command(tmp_path, capsys) -> None:
    config = tiny_config()
    params = init_params(config.model_for("finetune"), jax.random.key(1))
    save_model(tmp_path / "model", params, config, load_tokenizer("easy_vqa"), {"stage": "finetune"})
    assert main.main(["bench", "image", f"--checkpoint={tmp_path / 'model'}", "--repeat=2",
                      f"--output={tmp_path / 'times.json'}"]) == 0  # fmt: skip
    times = json.loads((tmp_path / "times.json").read_text())
    assert all(len(times[name]) == 2 for name in ("first", "second", "first_processor")) and times["cores"] > 0
    out = capsys.readouterr().out
    assert "a second one" in out and "An image's keys and values take 4 KiB" in out
    assert main.main(["bench", "image", "--checkpoint=nowhere"]) == 2
    assert main.main(["bench", "image", "--checkpoint=nowhere", "--repeat=0"]) == 2
    assert "--repeat=0 must be at least 1" in capsys.readouterr().err
