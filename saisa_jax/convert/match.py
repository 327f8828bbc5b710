"""Matches a source's tensors to the rows of a layout: which layout it is, and everything that does not fit, by name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import logging

from saisa_jax.config import ModelConfig
from saisa_jax.convert.families import DECODERS, ENCODERS
from saisa_jax.convert.files.tensors import CheckpointSource, TensorSource
from saisa_jax.convert.layouts import Layout, layout_for
from saisa_jax.convert.rows import ConvertError, TensorRow
from saisa_jax.errors import nearest

NEAREST_FOR = 50  # so many missing tensors get the nearest names; the rest are listed alone


def layout_of(tensors: CheckpointSource) -> str:
    """The layout of a source, told from the names of its tensors, or else from its config.json.

    Raises:
      ConvertError: no known layout.
    """
    keys = tensors.names
    if any(re.search(r"multi_modal_projector\.(\d+|shared)\.", key) for key in keys):
        return "hf"
    if any(".multi_modal_projector." in f".{key}" for key in keys):
        return "llava-hf"
    if any(key.startswith("model.layers.") and ".mm_projector." in key for key in keys):
        return "saisa"
    if any(key.startswith("model.mm_projector.") for key in keys):
        return "llava"
    if any(key.endswith("embed_tokens.weight") for key in keys):
        return "hf-llm"
    if any(".patch_embedding" in f".{key}" for key in keys):
        return "hf-vision"
    for layout, families in (("hf-llm", DECODERS), ("hf-vision", ENCODERS)):
        if _model_type(tensors) in [family.model_type for family in families.values()]:
            return layout
    known = ", ".join((*DECODERS, *ENCODERS))
    raise ConvertError(
        f"{tensors.where}: no known layout has tensors like {', '.join(keys[:5])}; known families: {known}"
    )


def _model_type(tensors: CheckpointSource) -> str | None:
    try:
        return tensors.config().get("model_type")
    except ConvertError:  # a directory of tensors alone
        return None


@dataclass(frozen=True)
class Match:
    """The result of matching a source's tensors to the rows of a layout."""

    spelt: dict[str, str]  # canonical key -> the source's spelling, of all its tensors
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]  # as the source spells them
    ignored: tuple[str, ...]  # likewise: not used
    problems: tuple[str, ...]  # a line each: missing, unexpected, misshaped, ...
    summary: str

    def checked(self) -> dict[str, str]:
        """The spellings.

        Raises:
          ConvertError: anything that does not fit; all of it is listed.
        """
        if self.problems:
            raise ConvertError(f"{self.summary} ({len(self.problems)} tensors):\n  " + "\n  ".join(self.problems))
        return self.spelt


def match(tensors: TensorSource, layout: Layout, parts: Sequence[str], dtype: Any = None) -> Match:
    """Compares names, shapes and dtypes with the rows of the parts; reads no tensor except a tied head."""
    spelt, problems = _spellings(tensors, layout)
    wanted = {key: row for row in layout.only(parts) for key in row.keys}
    others = {key for row in layout.rows for key in row.keys} - set(wanted)
    tied = {key for key, _ in layout.tied}
    for key, other in layout.tied:
        if other not in spelt and key in spelt:  # the files hold what is tied under the other name
            spelt[other] = spelt.pop(key)
    unexpected = [k for k in spelt if k not in wanted and k not in others and k not in tied and not layout.ignores(k)]
    missing = [key for key in wanted if key not in spelt]
    for n, key in enumerate(missing):
        near = nearest(key, unexpected, n=2, cutoff=0.8) if n < NEAREST_FOR else []
        problems.append(f"missing     {key}" + (f"   (nearest: {', '.join(spelt[k] for k in near)})" if near else ""))
    problems += [f"unexpected  {spelt[key]} {list(tensors.shape(spelt[key]))}" for key in unexpected]
    for key, row in wanted.items():
        if key not in spelt:
            continue
        seen = tensors.shape(spelt[key])
        if seen != row.theirs:
            problems.append(f"misshaped   {spelt[key]} is {list(seen)}, expected {list(row.theirs)} for {row.path}")
        if not tensors.is_float(spelt[key]):
            problems.append(f"wrong dtype {spelt[key]} is {tensors.dtype_name(spelt[key])}, expected a float")
    problems += _mixed_dtypes(tensors, layout.only(parts), spelt) if dtype is None else []
    for key, other in layout.tied:
        if key in spelt and other in spelt and not _equal(tensors, spelt[key], spelt[other]):
            problems.append(f"not tied    {spelt[key]} differs from {spelt[other]}: set model.tie_embeddings=False")
    head = " (if it is the table of tokens, config.json has to say tie_word_embeddings: true)"
    problems = [
        line + head if line.startswith("missing ") and "lm_head.weight" in line.split()[1] else line
        for line in problems
    ]
    return Match(
        spelt,
        tuple(missing),
        tuple(spelt[key] for key in unexpected),
        tuple(name for key, name in spelt.items() if key not in wanted and key not in unexpected),
        tuple(problems),
        f"{tensors.where} does not fit the layout {layout.name!r} of this model",
    )


def settle_head(tensors: TensorSource, config: ModelConfig, layout: str) -> ModelConfig:
    """The config with a head of its own where the files hold one that is not the table of tokens.

    config.json may say that the two are tied nevertheless; transformers 5 believes the files as well.
    """
    rows = layout_for(config, layout) if layout != "hf-vision" else None
    spelt = {rows.canonical(key): key for key in tensors.names} if rows and rows.tied else {}
    for key, other in rows.tied if rows else ():
        if key in spelt and other in spelt and not _equal(tensors, spelt[key], spelt[other]):
            logging.warning(
                "%s: config.json ties the head to the table of tokens, but the files hold another head: it is taken",
                tensors.where,
            )
            return dataclasses.replace(config, tie_embeddings=False)
    return config


def _mixed_dtypes(tensors: TensorSource, rows: Sequence[TensorRow], spelt: dict[str, str]) -> list[str]:
    """Rows that would stack tensors of several dtypes."""
    found = []
    for row in rows:
        dtypes = {
            key: tensors.dtype_name(spelt[key]) for key in row.keys if key in spelt and tensors.is_float(spelt[key])
        }
        first = next(iter(dtypes), "")
        odd = next((key for key in dtypes if dtypes[key] != dtypes[first]), None)
        if odd:
            seen = f"{first} is {dtypes[first]}, {odd} is {dtypes[odd]}"
            found.append(f"mixed       {row.path}: {seen}; say which is wanted, --dtype=float32")
    return found


def _equal(tensors: TensorSource, key: str, other: str) -> bool:
    return tensors.shape(key) == tensors.shape(other) and np.array_equal(tensors.read(key), tensors.read(other))


def _spellings(tensors: TensorSource, layout: Layout) -> tuple[dict[str, str], list[str]]:
    spelt: dict[str, str] = {}
    twice = []
    for key in tensors.names:
        name = layout.canonical(key)
        if name in spelt:
            twice.append(f"twice       {name}: as {spelt[name]} and as {key}")
        spelt[name] = key
    return spelt, twice


def parts_in(tensors: TensorSource, layout: Layout) -> tuple[str, ...]:
    """Which parts a directory holds: all of the layout's, but a vision tower only if there is a tensor of it."""
    have = {layout.canonical(key) for key in tensors.names}
    parts = dict.fromkeys(row.part for row in layout.rows)
    tower = any(key in have for row in layout.only(("vision",)) for key in row.keys)
    return tuple(part for part in parts if part != "vision" or tower or len(parts) == 1)
