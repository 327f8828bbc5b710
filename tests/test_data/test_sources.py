"""Sources of every format are opened by one function, and go to other processes as little more than a path."""

from __future__ import annotations

import pickle

import pytest

from saisa_jax.config import FORMATS, SourceConfig
from saisa_jax.data.sample import DataError, Samples
from saisa_jax.data.sources import OPENERS, open_source


def test_every_format_has_an_opener() -> None:
    assert set(OPENERS) == set(FORMATS)


def test_the_embedded_set_is_small_when_pickled() -> None:
    samples = open_source(SourceConfig("easy_vqa", split="validation"))
    assert isinstance(samples, Samples)
    assert len(pickle.dumps(samples)) < 200
    copy = pickle.loads(pickle.dumps(samples))
    assert len(copy) == len(samples) == 200 and copy[7] == samples[7]
    with pytest.raises(DataError, match=r"easy_vqa has the splits train, validation, test, not 'dev'"):
        open_source(SourceConfig("easy_vqa", split="dev"))
