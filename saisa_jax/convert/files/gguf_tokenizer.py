"""A tokenizer from a GGUF file's metadata: byte-level BPE (`gpt2`) and SentencePiece's BPE (`llama`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saisa_jax.convert.rows import ConvertError

CONTROL, USER_DEFINED, BYTE = 3, 4, 6  # token types of GGUF
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(digits: str) -> Any:
    pattern = Regex(rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|{_REST}")
    split = pre_tokenizers.Split(pattern, behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _byte_level(split_digits: bool) -> Any:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    # Without its own step for digits, a number after white space would be cut in other places than in training.
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level]) if split_digits else level


# How text is cut before the merges, by `tokenizer.ggml.pre`.
PRE_TOKENIZERS = {
    "default": lambda: _byte_level(False),
    "gpt-2": lambda: _byte_level(False),
    "smollm": lambda: _byte_level(True),
    "llama-bpe": lambda: _split(r"\p{N}{1,3}"),
    "qwen2": lambda: _split(r"\p{N}"),
}


def build_tokenizer(metadata: Mapping[str, Any], where: Path) -> PreTrainedTokenizerFast:
    """The tokenizer; no BOS is added by itself, since the templates say where one stands.

    Raises:
      ConvertError: a kind that is not known here; says which are, and the way around.
    """
    get = lambda name, default=None: metadata.get(f"tokenizer.ggml.{name}", default)  # noqa: E731
    hint = f"name the tokenizer's directory, --tokenizer=DIR ({where})"
    tokens, kind = get("tokens"), get("model")
    if not tokens:
        raise ConvertError(f"the file holds no tokenizer: {hint}")
    if kind == "gpt2":
        pre = get("pre", "default")
        if pre not in PRE_TOKENIZERS:
            raise ConvertError(f"tokenizer.ggml.pre={pre!r} is not one of {', '.join(PRE_TOKENIZERS)}: {hint}")
        tokenizer = _byte_level_bpe(tokens, get("merges", []), pre)
    elif kind == "llama":
        tokenizer = _sentencepiece(tokens, get("scores", []), get("token_type", []), get("unknown_token_id", 0))
    else:
        raise ConvertError(f"tokenizer.ggml.model={kind!r} is not one of gpt2, llama: {hint}")
    types = get("token_type", [])
    added = [
        AddedToken(token, special=type_ == CONTROL, normalized=False)
        for token, type_ in zip(tokens, types, strict=False)
        if type_ in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: get(f"{theirs}_token_id") for name, theirs in names.items()}
    special = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
    fast.chat_template = metadata.get("tokenizer.chat_template")
    return fast


def _byte_level_bpe(tokens: list[str], merges: list[str], pre: str) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre == "llama-bpe")
    except Exception as error:  # the library raises nothing narrower
        raise ConvertError(f"the file's tokenizer contradicts itself: {error}") from error
    tokenizer = Tokenizer(model)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(tokens: list[str], scores: list[float], types: list[int], unknown: int) -> Tokenizer:
    """SentencePiece merges the pair whose outcome has the best score; the order of scores is that of the merges."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    plain = {token for token, type_ in zip(tokens, types, strict=True) if type_ not in (CONTROL, BYTE)}
    pairs = [
        (-scores[vocabulary[token]], vocabulary[token[:cut]], vocabulary[token[cut:]], token[:cut], token[cut:])
        for token in plain
        for cut in range(1, len(token))
        if token[:cut] in plain and token[cut:] in plain
    ]
    merges = [(left, right) for _, _, _, left, right in sorted(pairs)]
    model = models.BPE(
        vocab=vocabulary, merges=merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=BYTE in types
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer
