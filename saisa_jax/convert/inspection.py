"""`convert inspect`: what a directory, a GGUF file or a finished model holds, and what an import would make of it."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.console import Console
from rich.table import Table as RichTable

from saisa_jax.checkpoints import read_account
from saisa_jax.config import ModelConfig, VisionConfig
from saisa_jax.convert import sidecar
from saisa_jax.convert.configs import config_from_hf, decoder_config_from_hf
from saisa_jax.convert.files.open import open_checkpoint
from saisa_jax.convert.files.tensors import CheckpointSource
from saisa_jax.convert.layouts import TOWER_APART, Layout, decoder_family, encoder_family, layout_for
from saisa_jax.convert.match import Match, layout_of, match, parts_in, settle_head
from saisa_jax.convert.rows import ConvertError, part_of_path

SHOWN = 12  # names of a list; --all shows every one


def inspect(path: Path, *, vision: Path | None = None, everything: bool = False) -> None:
    """Prints what is there.

    Raises:
      ConvertError, CheckpointError: nothing that can be read.
    """
    console = Console(soft_wrap=True)
    if (path / "model.json").exists():
        _inspect_model(console, path, everything)
        return
    tower = open_checkpoint(vision) if vision else None
    _inspect_source(console, open_checkpoint(path), path, vision, tower, everything)


def _inspect_source(
    console: Console,
    tensors: CheckpointSource,
    path: Path,
    vision: Path | None,
    tower: CheckpointSource | None,
    everything: bool,
) -> None:
    layout = layout_of(tensors)
    model, known_tower = _config(tensors, layout, path, vision)
    model = settle_head(tensors, model, layout)
    rows = layout_for(model, layout)
    parts = parts_in(tensors, rows) if known_tower else ("decoder", "projector")
    found = match(tensors, rows, parts, "float32")
    console.print(f"{path}: layout {layout}, family {_family(model, layout)}")
    _print_config(console, model, layout, known_tower)
    _print_tensors(console, tensors, rows, {name: key for key, name in found.spelt.items()}, everything)
    if not known_tower:
        name = tensors.config().get("mm_vision_tower") or "not named"
        flag = f"--vision={name if '/' in name else 'DIR'}"
        console.print(
            f"The vision tower ({name}) is not here: an import needs {flag}, and inspect checks it with the same flag.",
            highlight=False,
        )
    _print_match(console, found, everything)
    if tower is not None:
        console.print(f"{vision}: the vision tower")
        _print_match(console, match(tower, layout_for(model, "hf-vision"), ("vision",), "float32"), everything)


def _print_match(console: Console, found: Match, everything: bool) -> None:
    _print_names(console, "ignored, kept in the sidecar by an import", found.ignored, everything)
    _print_names(console, "missing", found.missing, everything)
    _print_names(console, "unexpected", found.unexpected, everything)
    other = [line for line in found.problems if not line.startswith(("missing", "unexpected"))]
    _print_names(console, "does not fit", other, everything)


def _config(tensors: CheckpointSource, layout: str, path: Path, vision: Path | None) -> tuple[ModelConfig, bool]:
    """The model that the files describe, and whether they describe its tower."""
    raw = tensors.config()
    try:
        return config_from_hf(path, layout=layout, vision=vision, raw=raw), True
    except ConvertError:
        if layout not in TOWER_APART or vision is not None:
            raise
    width = raw.get("mm_hidden_size", VisionConfig().embed_dim)
    heads = math.gcd(width, VisionConfig().num_heads)
    tower = dataclasses.replace(VisionConfig(), embed_dim=width, num_heads=heads)
    alignment, sharing = ("saisa", "per_layer") if layout == "saisa" else ("llava", "shared")
    return decoder_config_from_hf(raw, path, alignment=alignment, sharing=sharing, vision=tower), False


def _family(model: ModelConfig, layout: str) -> str:
    names = [] if layout == "hf-vision" else [decoder_family(model).model_type]
    return " + ".join([*names, *([] if layout == "hf-llm" else [encoder_family(model.vision).model_type])])


def _print_config(console: Console, model: ModelConfig, layout: str, tower: bool) -> None:
    if layout != "hf-vision":
        console.print(
            f"  decoder: {model.num_layers} layers, width {model.embed_dim}, MLP {model.mlp_dim}, "
            f"{model.num_heads} heads ({model.num_kv_heads} key/value) of {model.head_dim}, vocabulary "
            f"{model.vocab_size}, context {model.max_length}, rope {model.rope_theta:g}"
        )
    if layout != "hf-llm" and tower:
        vision = model.vision
        console.print(
            f"  vision:  {vision.num_layers} layers ({vision.num_used_layers} used), width {vision.embed_dim}, MLP "
            f"{vision.mlp_dim}, {vision.num_heads} heads, {vision.image_size} pixels in patches of {vision.patch_size}"
        )


def _print_tensors(
    console: Console, tensors: CheckpointSource, rows: Layout, canonical: Mapping[str, str], everything: bool
) -> None:
    parts: dict[str, Counter[str]] = {}
    part_of = {key: row.part for row in rows.rows for key in row.keys}
    for name in tensors.names:
        key = canonical.get(name, name)
        part = part_of.get(key, "(ignored)" if rows.ignores(key) else "(tied or unknown)")
        counter = parts.setdefault(part, Counter())
        counter["tensors"] += 1
        counter["parameters"] += math.prod(tensors.shape(name))
        kind, size = tensors.stored(name)
        counter["bytes"] += size
        counter[f"dtype {kind}"] += 1
    _print_parts(console, parts)
    if everything:
        listing = _new_table("tensor", "shape", "dtype")
        for name in tensors.names:
            listing.add_row(name, str(list(tensors.shape(name))), tensors.stored(name)[0])
        console.print(listing)


def _inspect_model(console: Console, path: Path, everything: bool) -> None:
    document, config = read_account(path)
    metadata, leaves = document["metadata"], document["leaves"]
    model = config.model_for(metadata["stage"])
    console.print(f"{path}: a finished model of saisa_jax, alignment {model.alignment}, stage {metadata['stage']}")
    _print_config(console, model, "saisa", True)
    parts: dict[str, Counter[str]] = {}
    for name, leaf in leaves.items():
        counter = parts.setdefault(part_of_path(name), Counter())
        counter["tensors"] += 1
        counter["parameters"] += math.prod(leaf["shape"])
        counter["bytes"] += math.prod(leaf["shape"]) * jnp.dtype(leaf["dtype"]).itemsize
        counter[f"dtype {leaf['dtype']}"] += 1
    _print_parts(console, parts)
    absent = [part for part in ("decoder", "projector", "vision") if part not in parts]
    if absent:
        console.print(f"It holds no {' and no '.join(absent)}.")
    if everything:
        listing = _new_table("parameter", "shape", "dtype")
        for name, leaf in leaves.items():
            listing.add_row(name, str(leaf["shape"]), leaf["dtype"])
        console.print(listing)
    for name, (source, directory) in sidecar.read(path).items():
        files = ", ".join(file.name for file in sidecar.kept_files(directory)) or "none"
        console.print(f"sidecar {name}: from layout {source.layout}, {len(source.kept)} tensors; files: {files}")
        _print_names(console, "kept", list(source.kept), everything)
        _print_names(console, "stale, their part was trained since", source.stale(leaves), everything)


def _print_parts(console: Console, parts: Mapping[str, Mapping[str, int]]) -> None:
    listing = _new_table("part", "tensors", "parameters", "size", "dtypes")
    for part, counter in parts.items():
        kinds = {key.removeprefix("dtype "): n for key, n in counter.items() if key.startswith("dtype ")}
        dtypes = ", ".join(kinds) if len(kinds) == 1 else ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        size = _size(counter["bytes"])
        listing.add_row(part, str(counter["tensors"]), f"{counter['parameters']:,}", size, dtypes)
    console.print(listing)


def _print_names(console: Console, title: str, names: Iterable[Any], everything: bool) -> None:
    names = list(names)
    if not names:
        return
    console.print(f"{title}: {len(names)}")
    for name in names if everything else names[:SHOWN]:
        console.print(f"  {name}", markup=False, highlight=False)
    if len(names) > SHOWN and not everything:
        console.print(f"  ... and {len(names) - SHOWN} more (--all)")


def _new_table(*columns: str) -> RichTable:
    listing = RichTable()
    for n, column in enumerate(columns):
        listing.add_column(column, justify="left" if n in (0, len(columns) - 1) else "right", overflow="fold")
    return listing


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
