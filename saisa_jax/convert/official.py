"""What keeps the official SAISA program (github.com/icip-cas/SAISA, transformers 4.37) from running an export.

Its rules are read from its sources: the folder's name chooses the class, the tower is found by the name in config.json,
tokenizers are slow ones, and every projector is 1024 wide.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from saisa_jax import buckets
from saisa_jax.convert.hf_json import CONFIG, PREPROCESSOR_CONFIG, read_json, read_json_if_there, write_json

WIDTH = 1024  # of the tower's features: written out in its decoder layer
FETCHED = ("openai", "laion")  # towers that it takes from the hub begin so
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
FAST = "PreTrainedTokenizerFast"  # the one fast class that it takes, since it has no slow one


def fetches(tower: str) -> bool:
    """Whether the official program takes a tower of this name from the hub."""
    return tower.startswith(FETCHED) or "ShareGPT4V" in tower


def official_notes(directory: Path | epath.Path) -> tuple[str, ...]:
    """Why the official program does not run an export in the layout saisa as it lies there; (): it does."""
    raw = read_json(directory / CONFIG)
    return (*_name(buckets.absolute(directory)), *_decoder(raw), *_vision(raw, directory), *_tokenizer(directory))


def _name(directory: Path | epath.Path) -> Iterator[str]:
    name = directory.name
    if name.startswith("checkpoint-"):  # then it takes the parent's as well
        name = f"{directory.parent.name}_{name}"
    if "saisa" not in name.lower():
        yield f"it knows SAISA by the folder's name, which must contain 'saisa': rename it to saisa-{directory.name}"
    for word in ("mpt", "mistral"):
        if word in name.lower():
            yield f"it takes a folder with {word!r} in its name for a class that it does not have: rename it"


def _decoder(raw: Mapping[str, Any]) -> Iterator[str]:
    if raw.get("model_type") != "llava_llama":
        yield f"its only decoder is Llama's, and this is {raw.get('model_type')!r}: it would compute another model"
    heads, width = raw["num_attention_heads"], raw["hidden_size"]
    if raw.get("head_dim", width // heads) * heads != width:
        yield f"its heads are {width} / {heads} wide, and these {raw['head_dim']}"
    scaling = raw.get("rope_scaling")
    if scaling and (set(scaling) != {"type", "factor"} or scaling["type"] not in ("linear", "dynamic")):
        yield f"its transformers (4.37) knows no rope_scaling like {scaling}"


def _vision(raw: Mapping[str, Any], directory: Path | epath.Path) -> Iterator[str]:
    if raw.get("mm_hidden_size") != WIDTH:
        yield f"its projectors take features that are {WIDTH} wide, and these are {raw.get('mm_hidden_size')}"
    name = raw.get("mm_vision_tower", "")
    if fetches(name):
        return
    if not Path(name).is_absolute():
        yield f"it has no tower of the name {name!r}: set mm_vision_tower in config.json to the tower's folder"
    folder = directory / name
    model_type = read_json_if_there(folder / CONFIG).get("model_type")
    if model_type not in (None, "clip", "clip_vision_model"):
        yield f"its only tower is CLIP's, and this is {model_type!r}"
    if model_type and not (folder / PREPROCESSOR_CONFIG).exists():
        yield f"{folder} has no {PREPROCESSOR_CONFIG}"


def _tokenizer(directory: Path | epath.Path) -> Iterator[str]:
    held = {file.name for file in directory.iterdir()}
    slow = "tokenizer.model" in held or {"vocab.json", "merges.txt"} <= held
    fast = read_json_if_there(directory / TOKENIZER_CONFIG).get("tokenizer_class") == FAST
    if not slow and not (fast and TOKENIZER in held and not _paired(read_json(directory / TOKENIZER))):
        yield "it reads slow tokenizers alone, and there is no tokenizer.model: copy the decoder's own into the folder"


def _paired(tokenizer: Mapping[str, Any]) -> bool:
    """Whether merges are pairs, as tokenizers has written them since 0.20; before, they were one string each."""
    return any(not isinstance(merge, str) for merge in tokenizer.get("model", {}).get("merges") or ())


def spell_for_transformers_4(directory: Path) -> None:
    """Respells a tokenizer that transformers 5 has saved: later versions read the older spelling as well.

    The class has another name there, and merges are pairs, which are the same in one string where no token has a space.
    """
    settings = read_json(directory / TOKENIZER_CONFIG)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        write_json(directory / TOKENIZER_CONFIG, settings | {"tokenizer_class": FAST})
    tokenizer = read_json_if_there(directory / TOKENIZER)
    if _paired(tokenizer) and not any(" " in part for merge in tokenizer["model"]["merges"] for part in merge):
        model = tokenizer["model"] | {"merges": [" ".join(merge) for merge in tokenizer["model"]["merges"]]}
        content = json.dumps(tokenizer | {"model": model}, ensure_ascii=False, indent=2)
        (directory / TOKENIZER).write_text(content, encoding="utf-8")
