"""LoRA adapters of PEFT and LLaVA over their base, as one checkpoint: the weights that the two compute together.

    W + (lora_alpha / r) B A        added in float32, rounded to the base's dtype; a table of embeddings is transposed

A folder of PEFT holds adapter_config.json and adapter_model.safetensors or .bin; one of LLaVA also config.json and
non_lora_trainables.bin (the projector). Tensors that were trained whole stand in the place of the base's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saisa_jax.convert.files.pickled import read_pickled_header, read_pickled_tensor
from saisa_jax.convert.files.safetensors import FLOATS, nbytes, read_header, read_tensor
from saisa_jax.convert.files.tensors import CheckpointSource
from saisa_jax.convert.hf_json import CONFIG, read_json
from saisa_jax.convert.rows import ConvertError
from saisa_jax.data.text.tokenizer import load_tokenizer

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
OTHERS = "non_lora_trainables.bin"
_REFUSED = {"use_dora": False, "fan_in_fan_out": False, "layer_replication": None, "trainable_token_indices": None}
_LORA = re.compile(r"(.+)\.lora_(A|B)(\.default)?\.weight|(.+)\.lora_embedding_(A|B)(\.default)?")


@dataclass(frozen=True)
class _Lazy:
    """A tensor of a small file."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


class AdaptedSource:
    """A base with an adapter merged into it.

    Args:
      directory: of the adapter.
      base: what it was trained on.

    Raises:
      ConvertError: not LoRA, a kind of it that is not computed, or tensors that the base has no place for.
    """

    def __init__(self, directory: Path, base: CheckpointSource):
        self.base, self.adapter = base, directory
        self.where = directory if (directory / CONFIG).exists() else base.where
        self._said = read_json(directory / ADAPTER_CONFIG)
        _check(self._said, directory)
        file = next((directory / name for name in WEIGHTS if (directory / name).exists()), None)
        if file is None:
            raise ConvertError(f"{directory} holds {ADAPTER_CONFIG} and neither {' nor '.join(WEIGHTS)}")
        held = _lazy(file) | (_lazy(directory / OTHERS) if (directory / OTHERS).exists() else {})
        places = {_canonical(name): name for name in base.names}
        self._whole: dict[str, _Lazy] = {}
        self._pairs: dict[str, dict[str, _Lazy]] = {}
        self._tables: set[str] = set()  # of embeddings, whose pairs are of the transposed table
        lost = []
        for key, tensor in held.items():
            name = re.sub(r"\A(base_model\.model\.)+", "", key).replace(".modules_to_save.default", "")
            name = name.replace(".modules_to_save", "").replace(".base_layer", "")
            lora = _LORA.fullmatch(name)
            place = places.get(_canonical(f"{lora[1] or lora[4]}.weight" if lora else name))
            if lora and place:
                self._pairs.setdefault(place, {})[lora[2] or lora[5]] = tensor
                self._tables |= {place} if lora[4] else set()
            elif "lora_" in name or (place is None and "projector" not in name):
                lost.append(key)
            else:
                self._whole[place or name] = tensor
        lost += [f"{name} (half of a pair)" for name, pair in self._pairs.items() if len(pair) != 2]
        if lost:
            raise ConvertError(
                f"{directory} has tensors that {base.where} has no place for; is that the base that it was trained on "
                f"(--base=)?\n  " + "\n  ".join(lost)
            )
        if self._tables and not any(name.endswith("lm_head.weight") for name in base.names):
            raise ConvertError(
                f"{directory} adapts the embeddings (lora_embedding_A and _B), and the head of {base.where} is tied to "
                "them: merged, the head would change too, which it was not trained with. This is not supported"
            )
        for name, pair in self._pairs.items():
            a, b, kernel = pair["A"].shape, pair["B"].shape, base.shape(name)
            kernel = kernel[::-1] if name in self._tables else kernel
            if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (b[0], a[1]) != kernel:
                raise ConvertError(f"{directory}: {name} is {list(kernel)} in the base, and its B A {b} x {a}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted({*self.base.names, *self._whole}))

    def shape(self, key: str) -> tuple[int, ...]:
        return self._whole[key].shape if key in self._whole else self.base.shape(key)

    def dtype_name(self, key: str) -> str:
        return self._whole[key].dtype if key in self._whole else self.base.dtype_name(key)

    def is_float(self, key: str) -> bool:
        return self._whole[key].dtype in FLOATS if key in self._whole else self.base.is_float(key)

    def stored(self, key: str) -> tuple[str, int]:
        if key in self._whole:
            return self._whole[key].dtype, nbytes(self._whole[key].dtype, self._whole[key].shape)
        return self.base.stored(key)

    def read(self, key: str) -> np.ndarray:
        if key in self._whole:
            return self._whole[key].read()
        kernel = self.base.read(key)
        if key not in self._pairs:
            return kernel
        a, b = (self._pairs[key][side].read().astype(np.float32) for side in "AB")
        change = (b @ a) * np.float32(self._scale(key, len(a)))
        return (kernel.astype(np.float32) + (change.T if key in self._tables else change)).astype(kernel.dtype)

    def _scale(self, key: str, rank: int) -> float:
        module = key.removesuffix(".weight")
        patterns = (self._said.get("alpha_pattern") or {}).items()
        own = [alpha for pattern, alpha in patterns if re.fullmatch(rf"(.*\.)?({pattern})", module)]
        alpha = own[0] if own else self._said["lora_alpha"]
        return alpha / (math.sqrt(rank) if self._said.get("use_rslora") else rank)

    def config(self) -> dict[str, Any]:
        raw = read_json(self.adapter / CONFIG) if self.where == self.adapter else self.base.config()
        table = next((name for name in self._whole if name.endswith("embed_tokens.weight")), None)
        if table is None:
            return raw
        rows = self.shape(table)[0]  # tokens were added
        return raw | ({"text_config": raw["text_config"] | {"vocab_size": rows}} if "text_config" in raw else {
            "vocab_size": rows
        })  # fmt: skip

    def tokenizer(self) -> Any:
        own = any((self.adapter / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
        return load_tokenizer(self.adapter) if own else self.base.tokenizer()


def base_of(directory: Path) -> str:
    """The base that an adapter names.

    Raises:
      ConvertError: it names none.
    """
    name = read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not name:
        raise ConvertError(f"{directory / ADAPTER_CONFIG} names no base: say --base=DIR_OR_REPO")
    return str(name)


def _check(said: Mapping[str, Any], directory: Path) -> None:
    if said.get("peft_type") != "LORA":
        raise ConvertError(
            f"{directory}: peft_type={said.get('peft_type')!r} of an adapter is not supported, only 'LORA'"
        )
    for field, plain in _REFUSED.items():
        if said.get(field) not in (None, plain):
            raise ConvertError(
                f"{directory / ADAPTER_CONFIG}: {field}={said[field]!r} is not supported: merge it with PEFT "
                "(merge_and_unload) and import what comes of it"
            )
    if not isinstance(said.get("lora_alpha"), int | float):
        raise ConvertError(f"{directory / ADAPTER_CONFIG} has no lora_alpha")


def _canonical(name: str) -> str:
    """A tensor's name without the levels by which transformers' versions differ."""
    return ".".join(part for part in name.split(".") if part not in ("model", "language_model"))


def _lazy(path: Path) -> dict[str, _Lazy]:
    if path.suffix == ".bin":
        pickled = read_pickled_header(path)
        return {
            name: _Lazy(tensor.shape, tensor.storage.dtype, lambda tensor=tensor: read_pickled_tensor(path, tensor))
            for name, tensor in pickled.items()
        }
    return {
        name: _Lazy(entry.shape, entry.dtype, lambda entry=entry: read_tensor(path, entry))
        for name, entry in read_header(path).items()
    }
