"""Somebody else's checkpoint directory -> our parameters, one row of `tables.py` after the other.

    result = import_model("llava-1.5-7b-hf", dtype="float32")
    result.config, result.params, result.ignored

`read_params` is the core: it yields one finished parameter at a time, so that whoever wants them on devices can place
each before the next is read.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from saisa_jax.config import ModelConfig
from saisa_jax.convert.files.safetensors import DTYPES
from saisa_jax.convert.files.tensors import CheckpointSource, TensorSource, open_source
from saisa_jax.convert.hf_config import DECODERS, ENCODERS, decoder_config_from_hf, read_json, vision_config_from_hf
from saisa_jax.convert.tables import ConvertError, Row, Table, table

NEAREST_FOR = 50  # so many missing tensors get the nearest names; the rest are listed alone


@dataclass(frozen=True)
class Imported:
    """What came of a checkpoint directory."""

    config: ModelConfig
    params: dict[str, Any]  # nested, numpy leaves
    ignored: tuple[str, ...]  # tensors in the files that the model never reads


def detect_layout(directory: str | Path) -> str:
    """The layout of a checkpoint directory, told from the names of its tensors."""
    return layout_of(open_source(directory))


def layout_of(tensors: TensorSource) -> str:
    """The same for an open source.

    Raises:
      ConvertError: no known layout.
    """
    keys = tensors.names
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
    known = ", ".join((*DECODERS, *ENCODERS))
    raise ConvertError(
        f"{tensors.where}: no known layout has tensors like {', '.join(keys[:5])}; known families: {known}"
    )


def config_from_hf(
    directory: str | Path,
    *,
    layout: str | None = None,
    vision: str | Path | None = None,
    select_layer: int | None = None,
    raw: dict[str, Any] | None = None,
) -> ModelConfig:
    """The ModelConfig that a directory's config.json describes.

    Args:
      directory: a checkpoint in one of the layouts of `tables.py`.
      layout: one of `tables.LAYOUTS`; None: told from the tensors' names.
      vision: the directory of the vision tower, where the checkpoint does not describe its own (the layouts saisa and
        llava; None: the folder that `mm_vision_tower` names, if it is inside the directory).
      select_layer: which hidden state of the tower is used, where the checkpoint does not say (hf-vision); None:
        LLaVA's choice, -1 of a ConvNeXt, -2 of all others.
      raw: the content of config.json; None: it is read.

    Raises:
      ConvertError: a config that is missing, contradictory, or of a family or option not supported.
    """
    directory = Path(directory)
    layout = layout or detect_layout(directory)
    raw = raw or read_json(directory / "config.json")
    if layout == "hf-vision":
        raw_vision = raw.get("vision_config", raw)
        return dataclasses.replace(ModelConfig(), vision=vision_config_from_hf(raw_vision, directory, select_layer))
    if layout == "llava-hf":
        if "vision_config" not in raw or "text_config" not in raw:
            raise ConvertError(f"{directory / 'config.json'} has no text_config and vision_config, as llava-hf has")
        tower = vision_config_from_hf(raw["vision_config"], directory, raw.get("vision_feature_layer", -2))
        _expect(raw, "vision_feature_select_strategy", "default" if tower.class_token else "full", directory)
        _expect(raw, "projector_hidden_act", "gelu", directory)
        text = dict(raw["text_config"])
        text.setdefault("tie_word_embeddings", raw.get("tie_word_embeddings", False))
        return decoder_config_from_hf(text, directory, alignment="llava", sharing="shared", vision=tower)
    if layout == "hf-llm":
        text = raw.get("text_config", raw)
        if vision is None:
            return decoder_config_from_hf(text, directory)
        tower = vision_config_from_hf(read_json(Path(vision) / "config.json"), Path(vision), select_layer)
        return decoder_config_from_hf(text, directory, vision=tower)
    _expect(raw, "mm_projector_type", "mlp2x_gelu", directory)
    folder = vision_directory(directory, vision)
    mode = "pad" if raw.get("image_aspect_ratio") == "pad" else "square"  # LLaVA's default is CLIP's centre crop
    select = raw.get("mm_vision_select_layer", select_layer)
    tower = vision_config_from_hf(read_json(folder / "config.json"), folder, select, image_mode=mode)
    if raw.get("mm_vision_select_feature") != "cls_patch" or tower.class_token:  # cls_patch: all tokens
        _expect(raw, "mm_vision_select_feature", "patch", directory)
    width = raw.get("mm_hidden_size", tower.embed_dim)
    if width != tower.embed_dim:
        raise ConvertError(f"{directory}: mm_hidden_size={width}, but the tower in {folder} is {tower.embed_dim} wide")
    alignment, sharing = ("saisa", "per_layer") if layout == "saisa" else ("llava", "shared")
    return decoder_config_from_hf(raw, directory, alignment=alignment, sharing=sharing, vision=tower)


def _expect(raw: dict[str, Any], field: str, value: str, directory: Path) -> None:
    if raw.get(field, value) != value:
        raise ConvertError(f"{directory / 'config.json'}: {field}={raw[field]!r} is not supported, only {value!r}")


def vision_directory(directory: str | Path, vision: str | Path | None = None) -> Path:
    """Where the tower of an original LLaVA or SAISA checkpoint lies: `vision`, or a folder inside `directory`."""
    if vision is not None:
        return Path(vision)
    directory = Path(directory)
    name = read_json(directory / "config.json").get("mm_vision_tower", "")
    folder = directory / name
    if name and folder.is_dir() and folder.resolve().is_relative_to(directory.resolve()):
        return folder
    raise ConvertError(f"{directory} names its vision tower {name!r}; give the directory that holds it as vision=")


def read_params(
    tensors: TensorSource, layout: Table, parts: Sequence[str], spelt: dict[str, str], dtype: Any = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (path, array) for each row of the parts, reading tensor by tensor; nothing but the one array is held.

    Args:
      spelt: what `match` found and checked.
      dtype: of the arrays; None: that of the files.
    """
    for row in layout.only(parts):
        yield row.path, _read_row(tensors, row, spelt, dtype)


def _read_row(tensors: TensorSource, row: Row, spelt: dict[str, str], dtype: Any) -> np.ndarray:
    first = DTYPES[tensors.dtype_name(spelt[row.keys[0]])]
    array = np.zeros(row.shape, dtype if dtype is not None else first)
    for i, key in enumerate(row.keys):  # straight into its place: at most one tensor of theirs is held beside it
        row.fill(array if row.layers is None else array[i], tensors.read(spelt[key]))
    return array


@dataclass(frozen=True)
class Match:
    """How a source's tensors meet the rows of a layout."""

    spelt: dict[str, str]  # canonical key -> the source's spelling, of all its tensors
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]  # as the source spells them
    ignored: tuple[str, ...]  # likewise: nobody reads them
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


def match(tensors: TensorSource, layout: Table, parts: Sequence[str], dtype: Any = None) -> Match:
    """Compares names, shapes and dtypes with what the rows of the parts want; reads no tensor but a tied head."""
    spelt, problems = _spellings(tensors, layout)
    wanted = {key: row for row in layout.only(parts) for key in row.keys}
    others = {key for row in layout.rows for key in row.keys} - set(wanted)
    tied = {key for key, _ in layout.tied}
    unexpected = [k for k in spelt if k not in wanted and k not in others and k not in tied and not layout.ignores(k)]
    missing = [key for key in wanted if key not in spelt]
    for n, key in enumerate(missing):
        near = difflib.get_close_matches(key, unexpected, n=2, cutoff=0.8) if n < NEAREST_FOR else []
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
    return Match(
        spelt,
        tuple(missing),
        tuple(spelt[key] for key in unexpected),
        tuple(name for key, name in spelt.items() if key not in wanted and key not in unexpected),
        tuple(problems),
        f"{tensors.where} does not fit the layout {layout.layout!r} of this model",
    )


def _mixed_dtypes(tensors: TensorSource, rows: Sequence[Row], spelt: dict[str, str]) -> list[str]:
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


def _spellings(tensors: TensorSource, layout: Table) -> tuple[dict[str, str], list[str]]:
    spelt: dict[str, str] = {}
    twice = []
    for key in tensors.names:
        name = layout.canonical(key)
        if name in spelt:
            twice.append(f"twice       {name}: as {spelt[name]} and as {key}")
        spelt[name] = key
    return spelt, twice


def parts_in(tensors: TensorSource, layout: Table) -> tuple[str, ...]:
    """Which parts a directory holds: all of the layout's, but a vision tower only if there is a tensor of it."""
    have = {layout.canonical(key) for key in tensors.names}
    parts = dict.fromkeys(row.part for row in layout.rows)
    tower = any(key in have for row in layout.only(("vision",)) for key in row.keys)
    return tuple(part for part in parts if part != "vision" or tower or len(parts) == 1)


@dataclass(frozen=True)
class Piece:
    """One source of an import, matched: which of its tensors become which parameters."""

    name: str  # model, or vision: a tower that lies apart
    tensors: CheckpointSource
    layout: Table
    parts: tuple[str, ...]
    match: Match

    def read(self, dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
        """`read_params` of it."""
        return read_params(self.tensors, self.layout, self.parts, self.match.spelt, dtype)


def find_pieces(
    tensors: CheckpointSource,
    config: ModelConfig,
    layout: str,
    vision: str | Path | None = None,
    dtype: Any = None,
    allow_pickle: bool = False,
) -> tuple[Piece, ...]:
    """The sources that a model is made of: a checkpoint, and the directory of its tower if that lies apart.

    Args:
      vision: that directory; None: the tower is in the checkpoint, or (saisa, llava) in the folder that it names.

    Raises:
      ConvertError: a tower that is missing or one too many, or tensors that do not fit; all of a source's are listed.
    """
    rows = table(config, layout)
    parts = parts_in(tensors, rows)
    if layout == "llava-hf" and (vision or "vision" not in parts):
        raise ConvertError(
            f"{tensors.where} is in layout {layout!r}, which holds its own vision tower: leave out --vision"
            if vision
            else f"{tensors.where} holds no vision tower, which the layout {layout!r} requires"
        )
    if layout in ("saisa", "llava") and (vision or "vision" not in parts):
        parts, vision = ("decoder", "projector"), vision_directory(tensors.where, vision)
    found: list[tuple[str, CheckpointSource, Table, tuple[str, ...]]] = [("model", tensors, rows, parts)]
    if vision:
        found.append(("vision", open_source(vision, allow_pickle), table(config, "hf-vision"), ("vision",)))
    pieces = tuple(Piece(*piece, match(*piece[1:], dtype)) for piece in found)
    for piece in pieces:
        piece.match.checked()
    return pieces


def import_params(
    directory: str | Path,
    config: ModelConfig,
    *,
    layout: str | None = None,
    parts: Sequence[str] | None = None,
    dtype: Any = None,
) -> Imported:
    """The parameters that one directory holds for a model of `config`: a whole tree, or the branches that are there.

    Args:
      directory: safetensors, single or sharded, or a GGUF file.
      layout: one of `tables.LAYOUTS`; None: told from the tensors' names.
      parts: of decoder, projector, vision; None: what the layout holds, the tower only if it is in the directory.
      dtype: of the parameters; None: that of the files.

    Raises:
      ConvertError: missing, unexpected or misshaped tensors; the message lists all of them. Raised before the first
        parameter is read.
    """
    tensors = open_source(directory)
    rows = table(config, layout or layout_of(tensors))
    parts = parts_in(tensors, rows) if parts is None else parts
    found = match(tensors, rows, parts, dtype)
    flat = dict(read_params(tensors, rows, parts, found.checked(), dtype))
    return Imported(config, unflatten_dict(flat, sep="/"), found.ignored)


def import_model(
    directory: str | Path, *, vision: str | Path | None = None, layout: str | None = None, dtype: Any = None
) -> Imported:
    """A whole multimodal model: decoder, projectors and vision tower, with the config that their files describe.

    Args:
      directory: a checkpoint in the layout saisa, llava or llava-hf.
      vision: the directory of the vision tower, if it is not in the checkpoint (then the checkpoint's own is ignored,
        as the official code does).
      layout: as in `import_params`.
      dtype: of the parameters; None: that of the files.

    Raises:
      ConvertError: anything that does not fit, or no vision tower.
    """
    tensors = open_source(directory)
    layout = layout or layout_of(tensors)
    if layout not in ("saisa", "llava", "llava-hf"):
        raise ConvertError(f"{directory} is in layout {layout!r}, which is not a whole multimodal model")
    config = config_from_hf(directory, layout=layout, vision=vision, raw=tensors.config())
    pieces = find_pieces(tensors, config, layout, vision, dtype)
    flat = {path: array for piece in pieces for path, array in piece.read(dtype)}
    ignored = tuple(key for piece in pieces for key in piece.match.ignored)
    return Imported(config, unflatten_dict(flat, sep="/"), ignored)
