"""Sources of every format are opened by one function, and go to other processes as little more than a path."""

from __future__ import annotations

import pickle

import pytest

from saisa_jax.config import SourceConfig
from saisa_jax.data.sample import DataError, Samples
from saisa_jax.data.sources import SOURCES, open_source
from saisa_jax.registry import UnknownNameError


def test_every_format_is_found_by_its_name() -> None:
    assert set(SOURCES) == {"arrayrecord", "chat", "easy_vqa", "llava", "tfds"}
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
