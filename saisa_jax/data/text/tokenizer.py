"""Tokenizers: one from a directory, or the demo's, trained on the demo's own text."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from absl import logging
from etils import epath
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from saisa_jax.data.sample import DataError
from saisa_jax.data.sources import easy_vqa
from saisa_jax.data.text.sentencepiece_model import read_sentencepiece
from saisa_jax.data.text.templates import TEMPLATES, Template

PAD, UNKNOWN, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"
VOCAB_SIZE = 128
DEMO_TEMPLATES = ("plain", "vicuna_v1", "llama_3", "mistral_instruct", "chatml")  # another one changes every token id


def load_tokenizer(name_or_dir: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """The tokenizer of a directory, which may be in a bucket, or "easy_vqa": the demo's.

    One with SentencePiece's `tokenizer.model` (Vicuna, LLaVA-1.5) gives SentencePiece's own tokens. A tokenizer without
    a padding token pads with its unknown token, or else with its EOS.

    Raises:
      DataError: no such directory, no fast tokenizer in it, or one without an EOS token.
    """
    if name_or_dir == "easy_vqa":
        return train_tokenizer()
    where = f"data.tokenizer={os.fspath(name_or_dir)!r}"
    directory = epath.Path(name_or_dir)
    try:
        tokenizer = _read(directory) if directory.is_dir() else None
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
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
        return _read_local(Path(directory))
    with tempfile.TemporaryDirectory() as local:  # from_pretrained reads from disks only
        for file in directory.iterdir():
            (Path(local) / file.name).write_bytes(file.read_bytes())
        return _read_local(Path(local))


def _read_local(directory: Path) -> Any:
    model = directory / "tokenizer.model"
    if model.is_file():
        missing = [name for name in ("sentencepiece", "google.protobuf") if not _installed(name)]
        if missing:
            raise DataError("its tokenizer.model needs two packages: pip install sentencepiece protobuf")
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    exact = read_sentencepiece(model) if model.is_file() else None
    if exact is None:
        return tokenizer
    settings = directory / "tokenizer_config.json"
    # transformers makes up a value where there is none; the slow tokenizer's is True.
    legacy = json.loads(settings.read_text()).get("legacy") if settings.is_file() else None
    return _with_backend(tokenizer, exact, legacy)


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def _with_backend(tokenizer: Any, backend: Tokenizer, legacy: bool | None) -> Any:
    """The tokenizer with another backend of the same vocabulary; itself, with a warning, if that is another one."""
    for number, token in sorted(tokenizer.added_tokens_decoder.items()):
        if backend.token_to_id(token.content) is None and number == backend.get_vocab_size():
            backend.add_tokens([token])
    if backend.get_vocab() != tokenizer.get_vocab():
        logging.warning(
            "%s: tokenizer.model holds other tokens than the files beside it, and is left out: tokens can differ from "
            "those of the slow tokenizer",
            tokenizer.name_or_path,
        )
        return tokenizer
    backend.post_processor = tokenizer.backend_tokenizer.post_processor
    kept = ("model_max_length", "padding_side", "clean_up_tokenization_spaces")
    settings = {name: tokenizer.init_kwargs[name] for name in kept if name in tokenizer.init_kwargs}
    if legacy is not None:
        settings["legacy"] = legacy
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    made.add_special_tokens({name: token for name, token in tokenizer.special_tokens_map.items() if token})
    made.chat_template = tokenizer.chat_template
    return made


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
