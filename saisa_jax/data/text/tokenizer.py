"""Tokenizers: one from a directory, or the demo's, trained on the demo's own text."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from etils import epath
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from saisa_jax.data.sample import DataError
from saisa_jax.data.sources import easy_vqa
from saisa_jax.data.text.templates import TEMPLATES, Template

PAD, UNKNOWN, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"
VOCAB_SIZE = 128
DEMO_TEMPLATES = ("plain", "vicuna_v1", "llama_3", "mistral_instruct", "chatml")  # another one changes every token id


def load_tokenizer(name_or_dir: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """The tokenizer of a directory, which may be in a bucket, or "easy_vqa": the demo's.

    A tokenizer without a padding token pads with its unknown token, or else with its EOS.

    Raises:
      DataError: no such directory, no fast tokenizer in it, or one without an EOS token.
    """
    if name_or_dir == "easy_vqa":
        return train_tokenizer()
    where = f"data.tokenizer={os.fspath(name_or_dir)!r}"
    directory = epath.Path(name_or_dir)
    try:
        tokenizer = _read(directory) if directory.is_dir() else None
    except Exception as error:  # transformers raises almost anything on missing and broken files
        raise DataError(f"{where}: cannot read a tokenizer there: {error}") from error
    if tokenizer is None:
        raise DataError(f'{where} is not a directory with a tokenizer, nor "easy_vqa", the demo\'s')
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{where} is a slow tokenizer; save it as a fast one (tokenizer.json)")
    if tokenizer.eos_token_id is None:
        raise DataError(f"{where} has no EOS token; set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _read(directory: epath.Path) -> Any:
    if "://" not in os.fspath(directory):
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    with tempfile.TemporaryDirectory() as local:  # from_pretrained reads from disks only
        for file in directory.iterdir():
            (Path(local) / file.name).write_bytes(file.read_bytes())
        return AutoTokenizer.from_pretrained(local, local_files_only=True)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """The demo's tokenizer: a token for every word of its training text and of its templates, in lower case.

    Punctuation marks and the newline are tokens of their own; other words are `<unk>`. The control tokens of
    `DEMO_TEMPLATES` are in it, so that each of them can be tried. It is deterministic.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
    )


@lru_cache(maxsize=1)
def _trained() -> str:
    """The trained tokenizer as JSON."""
    templates = [TEMPLATES[name] for name in DEMO_TEMPLATES]
    controls = {token for template in templates for token in (template.end, *template.controls) if token}
    special = [PAD, UNKNOWN, BOS, EOS, *sorted(controls - {EOS})]
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[\w']+|[^\w\s']"), behavior="removed", invert=True)
    tokenizer.decoder = decoders.Sequence(  # a space before every word that does not start a line
        [
            decoders.Replace(Regex(r"^(?=\w)"), " "),
            decoders.Fuse(),
            decoders.Replace(Regex(r"(?<=^|\n) "), ""),
        ]
    )
    trainer = trainers.WordLevelTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*easy_vqa.texts(), *_template_texts(templates)], trainer)
    return tokenizer.to_str()


def _template_texts(templates: Sequence[Template]) -> list[str]:
    """The templates' own words."""
    texts: list[str] = []
    for template in templates:
        text = template.system_format.replace("{system}", template.system) + template.user
        for token in ("{system}", "{text}", *template.controls):
            text = text.replace(token, " ")
        texts.append(text)
    return texts
