"""Quantised checkpoints: known by their tensors, named by their config.json, refused in one line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from saisa_jax.convert.files.tensors import TensorSource
from saisa_jax.convert.rows import ConvertError

# What a quantised checkpoint has beside a model's own tensors, or in their place; the first that fits names it.
_MARKS = (
    ("bitsandbytes", r".*\.(quant_state\.bitsandbytes__\w+|absmax|nested_absmax|quant_map|SCB)"),
    ("compressed-tensors", r".*\.weight_(packed|shape|g_idx)"),
    ("GPTQ", r".*\.g_idx"),
    ("AWQ or GPTQ", r".*\.(qweight|qzeros)"),
    ("FP8", r".*\.weight_scale(_inv)?"),
)
_CODES = ("U8", "I8", "F8_E4M3", "F8_E5M2")  # dtypes of a `weight` that nobody multiplies as it is


def check_not_quantised(tensors: TensorSource, config: Mapping[str, Any]) -> None:
    """Refuses a quantised checkpoint; one whose config.json alone says so, with whole tensors, is let through.

    Raises:
      ConvertError: says how it is quantised, and what to take.
    """
    names = tensors.names
    found = next(((kind, name) for kind, mark in _MARKS for name in names if re.fullmatch(mark, name)), None)
    if found is None:
        coded = (name for name in names if name.endswith(".weight") and tensors.dtype_name(name) in _CODES)
        found = next(((tensors.dtype_name(name), name) for name in coded), None)
    if found is None:
        return
    kind, name = found
    said = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config") or {}
    method = said.get("quant_method") or kind
    bits = said.get("bits") or (4 if said.get("load_in_4bit") else 8 if said.get("load_in_8bit") else None)
    told = f"{method}, {bits} bits" if bits else str(method)
    raise ConvertError(
        f"{tensors.where} is quantised ({told}; it holds {name}), which is not read: take the checkpoint that it was "
        "made from, in bfloat16, float16 or float32, or one in GGUF (load(quantize='int8') makes weights small again)"
    )
