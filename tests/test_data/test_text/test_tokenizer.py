"""The demo's tokenizer, and tokenizers from directories."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from saisa_jax.data.sample import DataError
from saisa_jax.data.sources import easy_vqa
from saisa_jax.data.text.tokenizer import VOCAB_SIZE, load_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer("easy_vqa")


def test_small_and_always_the_same(tokenizer) -> None:
    assert len(tokenizer) < VOCAB_SIZE
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        0,
        1,
        2,
        3,
    )
    assert train_tokenizer().get_vocab() == tokenizer.get_vocab()
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_everything_of_the_demo_comes_back(tokenizer) -> None:
    texts = {*easy_vqa.texts(), *(text for q in easy_vqa.questions("test") for text in (q.question, q.answer))}
    assert len(texts) > 107
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_every_word_and_the_newline_are_tokens(tokenizer) -> None:
    ids = tokenizer.encode("\nWhat COLOR is the\ncircle?", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["\n", "what", "color", "is", "the", "\n", "circle", "?"]
    assert tokenizer.decode(ids) == "\nwhat color is the\ncircle?"


def test_clean_answers(tokenizer) -> None:
    ids = [*tokenizer.encode("a red circle", add_special_tokens=False), tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a red circle"


def test_unknown_words(tokenizer) -> None:
    ids = tokenizer.encode("a zebra", add_special_tokens=False)
    assert ids[1:] == [tokenizer.unk_token_id]


def test_saved_and_read_again(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    text = "USER: \nis there a red shape? ASSISTANT: no</s>"
    assert again.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.special_tokens_map == tokenizer.special_tokens_map
    ids = again.encode(text, add_special_tokens=False)
    assert again.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True)


def test_padding_falls_back_to_unknown(tmp_path) -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token_id == 0


def test_errors_name_the_flag(tmp_path) -> None:
    with pytest.raises(DataError, match=r"data.tokenizer='nowhere' is not a directory"):
        load_tokenizer("nowhere")
    with pytest.raises(DataError, match=r"data.tokenizer=.*cannot read a tokenizer there"):
        load_tokenizer(tmp_path)
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"has no EOS token"):
        load_tokenizer(tmp_path)
