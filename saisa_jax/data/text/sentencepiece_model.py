"""SentencePiece's `tokenizer.model` as a fast tokenizer that gives SentencePiece's own tokens.

LLaVA's and SAISA's weights were trained with the slow tokenizer, which is SentencePiece itself. What transformers makes
of the same file differs from it: no space of its own stands before a text that begins with one, and merges go by the
order of the vocabulary instead of the scores.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers

SPACE = "▁"
_BPE = 2  # trainer_spec.model_type
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # a piece's type


def read_sentencepiece(path: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokens of `SentencePieceProcessor.encode`; the file's control tokens are special.

    None: the file is none of SentencePiece's (as Llama 3's `tokenizer.model`), or of a kind that `tokenizers` does not
    follow to the token: unigrams, Unicode normalisation, pieces that a user defined.
    """
    from sentencepiece import sentencepiece_model_pb2  # needs protobuf; only these files do

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        with open(path, "rb") as file:
            proto.ParseFromString(file.read())
    except Exception:  # protobuf's own error, of another class in each of its implementations
        return None
    trainer, spec = proto.trainer_spec, proto.normalizer_spec
    followed = (
        trainer.model_type == _BPE
        and not trainer.treat_whitespace_as_suffix
        and not spec.precompiled_charsmap
        and not spec.remove_extra_whitespaces
        and {piece.type for piece in proto.pieces} <= {_NORMAL, _UNKNOWN, _CONTROL, _BYTE}
    )
    if not followed or not proto.pieces:
        return None
    unknown = [piece.piece for piece in proto.pieces if piece.type == _UNKNOWN]
    tokenizer = Tokenizer(
        models.BPE(
            {piece.piece: number for number, piece in enumerate(proto.pieces)},
            _merges({piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    )
    spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
    words: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        spaces.insert(0, normalizers.Prepend(SPACE))  # even where a space is written
        words.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(spaces), decoders.Sequence(words)
    tokenizer.add_special_tokens([piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)])
    return tokenizer


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """All ways to make a piece of two others, in the order in which SentencePiece makes them.

    The piece of the highest score comes first. Where scores are equal, as those of runs of spaces can be, it goes from
    left to right: the longer piece, whose left part stands already, comes first.
    """
    found = [
        (-score, -len(piece), -cut, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(left, right) for *_, left, right in sorted(found)]
