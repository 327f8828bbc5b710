"""Small tokenizers of every kind that a template meets, trained in a moment on the words of the tests."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from saisa_jax.data.text.templates import VICUNA_SYSTEM

SPECIAL = [
    "<unk>", "<s>", "</s>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
]  # fmt: skip
# Letters with the space before them, digits in threes, signs, line ends with the space before them, other space.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = [
    VICUNA_SYSTEM,
    "Be brief. USER: what shape is present? ASSISTANT: circle\nUSER: is it red? ASSISTANT: no, it is blue.\n\n",
    "[INST] Be brief. what shape is present? [/INST] circle [INST] is it red? [/INST] no, it is blue.",
    "system\nBe brief.\nuser\nwhat shape is present?\n\nassistant\ncircle\nuser\nis it red?\nassistant\nno, it is.",
]


def byte_level_backend(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_level() -> PreTrainedTokenizerFast:
    """As Llama 3 and Qwen split text."""
    return wrapped(byte_level_backend(SPECIAL))


def sentence_piece() -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral split text: spaces are part of the word, and one is put before every piece."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Prepend("▁")  # even where a space is written
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return wrapped(tokenizer)
