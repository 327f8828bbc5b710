"""Sources of every format are opened by one function, and go to other processes as little more than a path."""

from __future__ import annotations

import dataclasses
import pickle
import runpy
from pathlib import Path

import pytest

from saisa_jax.config import SourceConfig
from saisa_jax.data.pipeline import StageData
from saisa_jax.data.sample import DataError, Samples
from saisa_jax.data.sources import SOURCES, open_source
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.registry import UnknownNameError
from saisa_jax.testing.configs import tiny_config


def test_every_format_is_found_by_its_name() -> None:
    assert set(SOURCES) == {"arrayrecord", "chat", "easy_vqa", "llava", "parquet", "tfds"}
    with pytest.raises(UnknownNameError, match=r"sources.format='lava' is not one of .*; did you mean llava\?"):
        open_source(SourceConfig("lava"))


def test_the_embedded_set_is_small_when_pickled() -> None:
    samples = open_source(SourceConfig("easy_vqa", split="validation"))
    assert isinstance(samples, Samples)
    assert len(pickle.dumps(samples)) < 200
    copy = pickle.loads(pickle.dumps(samples))
    assert len(copy) == len(samples) == 200 and copy[7] == samples[7]
    with pytest.raises(DataError, match=r"easy_vqa has the splits train, validation, test, not 'dev'"):
        open_source(SourceConfig("easy_vqa", split="dev"))


COLORS = '''
from dataclasses import dataclass

from saisa_jax.data.pipeline import StageData
from saisa_jax.data.sample import ASSISTANT, USER, Sample, Turn
from saisa_jax.data.sources import SOURCES


@dataclass(frozen=True)
class Colors:
    """One question for each word of a text file."""

    words: tuple

    def __len__(self):
        return len(self.words)

    def __getitem__(self, index):
        turns = Turn(USER, f"what is colour {index}?"), Turn(ASSISTANT, self.words[index])
        return Sample(f"colors/{index}", turns, ())


@SOURCES.register("colors")
def open_colors(config):
    with open(config.path) as file:
        return Colors(tuple(file.read().split()))
'''


def test_a_source_of_ones_own_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SOURCES, "_entries", dict(SOURCES))
    (tmp_path / "colors.py").write_text(COLORS)
    (tmp_path / "words.txt").write_text("red blue green yellow " * 4)
    runpy.run_path(str(tmp_path / "colors.py"))
    source = SourceConfig("colors", path=str(tmp_path / "words.txt"))
    assert len(open_source(source)) == 16 and open_source(source)[1].turns[1].text == "blue"

    config = tiny_config()
    finetune = dataclasses.replace(config.finetune, sources=(source,), validation=())
    data = dataclasses.replace(config.data, turns_per_sample=None)
    config = dataclasses.replace(config, finetune=finetune, data=data)
    iterator = StageData(config, "finetune", load_tokenizer("easy_vqa")).batches()
    batch = next(iterator)
    iterator.close()
    assert {name.split("/")[0] for row in batch.sample_ids for name in row} == {"colors"}
    assert batch.batch["loss_weights"].any()
