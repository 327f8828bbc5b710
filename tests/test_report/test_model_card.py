"""The card of a model, and its way to the hub: what the checkpoint says, in a repository that nobody sees at first."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from saisa_jax import flops
from saisa_jax.__main__ import main
from saisa_jax.checkpoints import save_model
from saisa_jax.data.text.tokenizer import train_tokenizer
from saisa_jax.models.saisa import abstract_params
from saisa_jax.testing.checkpoints import write_checkpoint
from saisa_jax.testing.configs import tiny_config


class Hub:
    """Takes what is uploaded."""

    def __init__(self) -> None:
        self.made: list[tuple[str, bool]] = []
        self.files: dict[str, bytes] = {}

    def whoami(self) -> dict[str, Any]:
        return {"name": "somebody"}

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        self.made.append((name, private))
        return f"https://huggingface.co/{name}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        assert self.made[-1][0] == repo_id
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: made)
    return made


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    config = tiny_config()
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract_params(config.model))
    save_model(tmp_path / "ckpt", params, config, train_tokenizer(), {"stage": "finetune"})
    return tmp_path / "ckpt"


def test_a_trained_model_is_pushed_with_its_card(trained: Path, hub: Hub, tmp_path: Path) -> None:
    command = ["convert", "export", f"--from={trained}", "--layout=hf", f"--to={tmp_path / 'out'}", "--push=org/tiny"]
    assert main(command) == 0
    assert hub.made == [("org/tiny", True)]
    assert hub.files.keys() == {path.name for path in (tmp_path / "out").iterdir()} >= {"modeling_saisa.py"}
    card = hub.files["README.md"].decode()
    assert card.startswith("---\npipeline_tag: image-text-to-text\nlibrary_name: transformers\n")
    model = tiny_config().model
    taken = re.search(r"takes (\S+) TFLOPs", card)
    assert taken and float(taken[1]) == pytest.approx(flops.prefill(model, 64).total / 1e12, rel=1e-3)
    assert "| decoder | llama, 2 layers of width 32 |" in card and 'from_pretrained("org/tiny"' in card
    assert "- pretrain: easy_vqa; 3 steps of 8 rows, learning rate 0.001 (cosine), template `plain`" in card
    assert "- finetune: easy_vqa; 3 steps of 8 rows" in card and "trained from random weights" in card
    assert str(tmp_path) not in card


def test_an_import_names_where_it_came_from(hub: Hub, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", "llava-hf")
    (tmp_path / "in" / "LICENSE").write_text("terms")
    assert main(["convert", "import", f"--from={tmp_path / 'in'}", f"--to={tmp_path / 'ckpt'}"]) == 0
    command = ["convert", "export", f"--from={tmp_path / 'ckpt'}", "--layout=llava-hf", f"--to={tmp_path / 'out'}"]
    assert main([*command, "--push=org/tiny", "--public"]) == 0
    card = hub.files["README.md"].decode()
    assert hub.made == [("org/tiny", False)] and hub.files["LICENSE"] == b"terms"
    assert "Imported (decoder, projector, vision) and not trained by saisa_jax since." in card
    assert "(layout llava-hf), whose licence holds here as well" in card and "came with them: LICENSE" in card
    assert "## Use" not in card


def test_nothing_is_written_where_it_cannot_be_pushed(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub.errors import LocalTokenNotFoundError

    class Nobody(Hub):
        def whoami(self) -> dict[str, Any]:
            raise LocalTokenNotFoundError("no token")

    monkeypatch.setattr("huggingface_hub.HfApi", Nobody)
    command = ["convert", "export", f"--from={trained}", "--layout=hf", f"--to={tmp_path / 'out'}"]
    for name, reason in (("tiny", "is no repository of the hub: name it ORG/NAME"), ("org/tiny", "log in first")):
        assert main([*command, f"--push={name}"]) == 2
        assert reason in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
