"""Tokenizers of `tokenizer.model` alone: SentencePiece's own tokens, and LLaVA's and SAISA's labels made of them.

The rules of LLaVA's code are written anew here, to the same effect (llava/train/train.py, llava/mm_utils.py, and the
slow Llama tokenizer of transformers 4.37): the whole conversation as one text, and labels by counting the tokens of its
rounds.
"""

from __future__ import annotations

import io
import json
import random
import re
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from saisa_jax.data.sample import DataError, Turn
from saisa_jax.data.text import tokenizer as tokenizer_module
from saisa_jax.data.text.conversation import encode, encode_prompt
from saisa_jax.data.text.sentencepiece_model import read_sentencepiece
from saisa_jax.data.text.templates import VICUNA_SYSTEM
from saisa_jax.data.text.tokenizer import load_tokenizer

P = 4
WORDS = [
    VICUNA_SYSTEM + " USER: what is it? ASSISTANT: a red circle, 2024 and 17 blue squares!",
    "Is there a cat on the table?\nYes, it is.  No: it isn't.\tZürich façade USER USER ASSISTANT    spaces",
]
TEXTS = [
    "What is it?", "\nWhat is it?", " a cat", "  a  cat ", "a\n\n b", "日本語 🙂 é", "12345 67", "\t tab", "", " ",
    "    ", "👨‍👩‍👧 family", "caffè\r\nlatte", "<s> </s> <unk> <0x0A>", "▁a▁", "A chat  ", "\u3000wide\u00a0",
    "USER: x", "हिन्दी עברית",
]  # fmt: skip
ROUNDS = (
    ("<image>\nWhat is it?", "a red circle,  2024"),
    ("Is there\n\n a cat 🙂 on the table?", "Yes, it is.\nNo: 日本 isn't."),
    ("USER, 17?", "12345"),
)


def trained(**settings: object) -> bytes:
    """A small model as Llama's: BPE with bytes, digits one by one, spaces as they are."""
    stream = io.BytesIO()
    llama = {
        "model_type": "bpe", "byte_fallback": True, "split_digits": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "vocab_size": 420,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 30), model_writer=stream, hard_vocab_limit=False, pad_id=-1, minloglevel=2,
        **llama | settings,
    )  # fmt: skip
    return stream.getvalue()


@pytest.fixture(scope="module")
def model() -> bytes:
    return trained()


@pytest.fixture(scope="module", params=["absent", True, False], ids=lambda legacy: f"legacy {legacy}")
def legacy(request) -> bool | str:
    return request.param


@pytest.fixture(scope="module")
def folder(model, legacy, tmp_path_factory) -> Path:
    """A directory as Vicuna's: `tokenizer.model` and its configuration."""
    root = tmp_path_factory.mktemp("vicuna")
    (root / "tokenizer.model").write_bytes(model)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings |= {} if legacy == "absent" else {"legacy": legacy}
    (root / "tokenizer_config.json").write_text(json.dumps(settings))
    (root / "config.json").write_text('{"model_type": "llama"}')
    return root


# --- Tokens ----------------------------------------------------------------------------------------------------------


def random_texts(count: int, pieces: list[str]) -> list[str]:
    rng = random.Random(0)
    letters = [*'aabcdee    \n\t0189.,!?"(){}<>/ABC▁日🙂é\u200dﬁ', "   ", "the", " is", "</s>", "\r\n"]
    texts = ("".join(rng.choices(letters if n % 2 else pieces, k=rng.randint(0, 14))) for n in range(count))
    return [text + " " * rng.choice([0, 0, 9]) for text in texts]


def test_tokens_are_sentence_pieces(folder, model, tmp_path) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [theirs.id_to_piece(number).replace("▁", " ") for number in range(3, len(theirs))]
    tokenizer = load_tokenizer(folder)
    tokenizer.save_pretrained(tmp_path)
    for made in (tokenizer, AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):  # as a model keeps it
        backend = made.backend_tokenizer
        backend.encode_special_tokens = True
        for text in [*TEXTS, *random_texts(3000, pieces)]:
            ids = theirs.encode(text)
            assert backend.encode(text, add_special_tokens=False).ids == ids, text
            assert made.decode(ids) == theirs.decode(ids), text
        assert (made.bos_token_id, made.eos_token_id, made.unk_token_id) == (1, 2, 0)
        backend.encode_special_tokens = False
        assert made.encode("What</s>", add_special_tokens=False) == [*theirs.encode("What"), 2]


def test_equal_scores_go_from_left_to_right(model, tmp_path) -> None:
    """Mistral's runs of spaces, all of one score, which is lower than every word's."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    known = {piece.piece: piece for piece in proto.pieces}
    for count in (2, 3, 4, 5, 7):
        piece = known["▁" * count] if "▁" * count in known else proto.pieces.add(piece="▁" * count)
        piece.score, piece.type = -1e9, 1
    path = tmp_path / "tokenizer.model"
    path.write_bytes(proto.SerializeToString())
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    made = read_sentencepiece(path)
    assert made is not None
    for text in [*(" " * n + "a" + " " * m for n in range(12) for m in range(12)), " the cat", "  the cat"]:
        assert made.encode(text, add_special_tokens=False).ids == theirs.encode(text), text


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"user_defined_symbols": ["<sep>"]},
        {"remove_extra_whitespaces": True},
    ],
)
def test_what_cannot_be_followed_to_the_token_is_left_to_transformers(settings, tmp_path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained(**settings))
    assert read_sentencepiece(tmp_path / "tokenizer.model") is None


def test_another_file_of_that_name_is_left_alone(byte_level, tmp_path) -> None:
    byte_level.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # as Llama 3's
    assert load_tokenizer(tmp_path).get_vocab() == byte_level.get_vocab()


def test_tokens_added_beside_it_are_kept_and_another_vocabulary_is_told_of(folder, model, tmp_path, caplog) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(model)
    made = load_tokenizer(tmp_path)
    assert made.get_vocab() == tokenizer.get_vocab()
    assert made.encode(" a", add_special_tokens=False) == tokenizer.encode(" a", add_special_tokens=False)
    (tmp_path / "tokenizer.model").write_bytes(trained(vocab_size=330))
    with caplog.at_level("WARNING", "absl"):
        assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert "tokenizer.model holds other tokens than the files beside it" in caplog.text


def test_without_the_packages_it_says_which(folder, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer_module, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"data.tokenizer=.*: .*pip install sentencepiece protobuf"):
        load_tokenizer(folder)


# --- Labels ----------------------------------------------------------------------------------------------------------


class Slow:
    """The slow Llama tokenizer: SentencePiece on what lies between control tokens."""

    def __init__(self, model: bytes, legacy: bool) -> None:
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        proto.normalizer_spec.add_dummy_prefix = legacy
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self.legacy = legacy

    def __call__(self, text: str) -> list[int]:
        """With BOS."""
        if not self.legacy and text:
            text = "▁" + text.replace("▁", " ")
        ids = [1]
        for chunk in re.split(r"(</s>)", text):
            if chunk == "</s>":
                ids.append(2)
            elif self.legacy or not chunk.startswith(("▁", " ")):
                ids += self.sp.encode(chunk)
            else:
                ids += self.sp.encode("<unk>" + chunk)[len(self.sp.encode("<unk>")) :]
        return ids

    def with_images(self, text: str) -> list[int | None]:
        """`tokenizer_image_token`; an image is None."""
        chunks = [self(chunk) for chunk in text.split("<image>")]
        ids: list[int | None] = [1]
        for chunk in chunks:
            ids += [*chunk[1:], None]
        return ids[:-1]


def preprocess_v1(rounds, slow: Slow) -> tuple[list[int | None], list[bool]]:
    """LLaVA's tokens, and which are learned."""
    texts = [f"USER: {ask} ASSISTANT: {answer}" for ask, answer in rounds]
    texts[0] = f"{VICUNA_SYSTEM} {texts[0]}"
    ids = slow.with_images("</s>".join([*texts, ""]))
    learned = [False]
    for number, text in enumerate(texts):
        instruction = text[: text.index(" ASSISTANT: ")] + " ASSISTANT: "
        length, words = len(slow.with_images(text)), len(slow.with_images(instruction)) - 2
        if number and not slow.legacy:  # the first piece is another one than that of the text alone
            start = len(slow("USER: ")) - 1
            there = len(slow.sp.encode("USER: "))
            length, words = length - (start - there), words - (start - there)
        learned += [False] * words + [True] * (length - words)
    assert len(learned) == len(ids)
    return ids, learned


def interleaved(encoded) -> tuple[list[int | None], list[bool]]:
    """Tokens with None for every image, and which are learned."""
    ids: list[int | None] = []
    learned: list[bool] = []
    places = [*encoded.image_positions.tolist(), -1]
    weights = [False, *(encoded.loss_weights[:-1] > 0).tolist()]
    for token, position, weight in zip(encoded.tokens.tolist(), encoded.positions.tolist(), weights, strict=True):
        while places[0] >= 0 and places[0] < position:
            places.pop(0)
            ids.append(None)
            learned.append(False)
        ids.append(token)
        learned.append(weight)
    return ids, learned


@pytest.mark.parametrize("rounds", [ROUNDS, ROUNDS[:1], ROUNDS[1:], [(f"<image>\n{t.strip()}?", "ok") for t in TEXTS]])
def test_labels_are_llavas(folder, model, legacy, rounds) -> None:
    rounds = [(ask, answer) for ask, answer in rounds if "</s>" not in ask]
    turns = [Turn(role, text) for pair in rounds for role, text in zip(("user", "assistant"), pair, strict=True)]
    tokenizer = load_tokenizer(folder)
    theirs = preprocess_v1(rounds, Slow(model, legacy is not False))
    assert interleaved(encode(turns, "vicuna_v1", tokenizer, P)) == theirs
    prompt = encode_prompt(turns[:-1], "vicuna_v1", tokenizer, P)
    ids, _ = interleaved(prompt)
    assert ids == theirs[0][: len(ids)]
    assert sum(theirs[1][len(ids) :]) == len(theirs[1]) - len(ids)  # all that is left is the answer


def test_stage_1_learns_what_llava_learns_but_the_line_break(folder, model) -> None:
    """LLaVA: image, caption, newline, and all but the image is learned. Ours: a newline first, then caption and end."""
    caption = "a red circle, 2024"
    slow = Slow(model, True)
    theirs = slow.with_images(f"<image>{caption}\n")
    assert theirs == [1, None, *slow(f"{caption}\n")[1:]]
    ids, learned = interleaved(
        encode((Turn("user", "<image>"), Turn("assistant", caption)), "plain", load_tokenizer(folder), P)
    )
    words = slow(caption)[1:]
    assert ids == [1, None, *slow("\n")[1:], *words, 2]
    assert learned == [False] * (len(ids) - len(words) - 1) + [True] * (len(words) + 1)


def test_white_space_at_the_ends_of_what_is_said_is_left_out(folder) -> None:
    tokenizer = load_tokenizer(folder)
    plain, spaced = (
        encode((Turn("user", ask), Turn("assistant", answer)), "vicuna_v1", tokenizer, P)
        for ask, answer in (("What?", "Yes."), (" What?\n", "\tYes. \n"))
    )
    assert plain.tokens.tolist() == spaced.tokens.tolist()
