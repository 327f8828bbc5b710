"""Tokenizers of every kind that a template meets."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.testing import tokenizers


@pytest.fixture(scope="package")
def demo() -> PreTrainedTokenizerFast:
    return load_tokenizer("easy_vqa")


@pytest.fixture(scope="package")
def byte_level() -> PreTrainedTokenizerFast:
    return tokenizers.byte_level()


@pytest.fixture(scope="package")
def sentence_piece() -> PreTrainedTokenizerFast:
    return tokenizers.sentence_piece()


@pytest.fixture
def llama_3(tmp_path: Path) -> PreTrainedTokenizerFast:
    """As Llama 3's: its own BOS and EOS, no unknown token, no padding token; read from a directory.

    The token that ends SAISA's answers is number 0, the one that fills up rows.
    """
    backend = tokenizers.byte_level_backend(["<|end_of_text|>", "<|begin_of_text|>", *tokenizers.SPECIAL[-3:]])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    ).save_pretrained(tmp_path)
    return load_tokenizer(tmp_path)
