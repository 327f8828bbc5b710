"""Weights out: a finished model -> a directory that the official code and transformers load."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saisa_jax.checkpoints import load_model, read_account
from saisa_jax.config import ModelConfig, VisionConfig
from saisa_jax.convert import sidecar
from saisa_jax.convert.configs import (
    TORCH_DTYPES,
    decoder_to_hf,
    multimodal_to_hf,
    preprocessor_to_hf,
    vision_to_hf,
)
from saisa_jax.convert.files.safetensors import nbytes
from saisa_jax.convert.files.tensors import TensorSource
from saisa_jax.convert.hf_json import CONFIG, GENERATION_CONFIG, PREPROCESSOR_CONFIG, read_json, write_json
from saisa_jax.convert.layouts import TOWER_APART, layout_for
from saisa_jax.convert.sidecar import Source
from saisa_jax.convert.target import check_room, check_target, written_whole
from saisa_jax.convert.write import SHARD_BYTES, ParamsSource, write_shards
from saisa_jax.data.text.conversation import IMAGE
from saisa_jax.models.saisa import share_to_per_layer

TOWER = "vision_tower"  # the folder of the tower, beside a checkpoint in the layout saisa or llava


@dataclass(frozen=True)
class Exported:
    """What an export has to say."""

    files: tuple[str, ...]
    restored: tuple[str, ...]  # tensors that were written back from the sidecar
    stale: tuple[str, ...]  # those of them whose part has been trained since the import


@dataclass(frozen=True)
class _Model:
    """A finished model on the host."""

    params: dict[str, Any]
    config: ModelConfig
    tokenizer: Any
    leaves: Mapping[str, Any]
    sources: dict[str, tuple[Source, Path]]

    def source(self, layout: str) -> tuple[Source, Path] | tuple[None, None]:
        """The account of the source that was imported from this layout, and its sidecar."""
        return next((found for found in self.sources.values() if found[0].layout == layout), (None, None))


@dataclass(frozen=True)
class _Piece:
    """One directory of an export, made up before anything is written."""

    folder: str  # within the export; "": itself
    tensors: dict[str, tuple[TensorSource, str]]  # name in the files -> (source, its name there)
    copied: tuple[Path, ...]  # small files of the sidecar
    written: dict[str, dict[str, Any]]  # JSON files; they win over those that are copied
    tokenizer: Any  # None: none is written
    restored: tuple[str, ...]
    stale: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(nbytes(source.dtype_name(key), source.shape(key)) for source, key in self.tensors.values())

    def write(self, root: Path, shard_bytes: int) -> None:
        directory = root / self.folder
        directory.mkdir(exist_ok=True)
        write_shards(self.tensors, directory, shard_bytes)
        for file in self.copied:
            shutil.copyfile(file, directory / file.name)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)
        for name, content in self.written.items():
            write_json(directory / name, content)


def export_checkpoint(
    checkpoint: str | Path, layout: str, to: str | Path, *, dtype: str | None = None, shard_bytes: int = SHARD_BYTES
) -> Exported:
    """Writes a finished model in a layout of `layouts.LAYOUTS`: tensors, config.json, tokenizer, preprocessor.

    A model that was imported from this layout gets back what its sidecar kept, its spellings, and its dtypes.

    Args:
      to: a directory that does not exist yet, or is empty; it appears under its name when it is whole.
      dtype: of all tensors; None: those of the import from this layout, or else the parameters' own.

    Raises:
      ConvertError: a model that the layout cannot say or has no place for, or a target that cannot be written; nothing
        was written then.
      CheckpointError: the checkpoint cannot be read.
      OSError: writing failed; nothing is left under the name.
    """
    to = check_target(to)
    pieces = tuple(_pieces(_load(checkpoint, layout), layout, dtype))
    check_room(sum(piece.nbytes for piece in pieces), to)
    with written_whole(to) as directory:
        for piece in pieces:
            piece.write(directory, shard_bytes)
        files = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    restored, stale = (tuple(key for piece in pieces for key in getattr(piece, name)) for name in ("restored", "stale"))
    return Exported(tuple(files), restored, stale)


def _load(checkpoint: str | Path, layout: str) -> _Model:
    document, config = read_account(checkpoint)
    model = config.model_for(document["metadata"]["stage"])
    sources = sidecar.read(checkpoint)
    params, _, tokenizer, _ = load_model(checkpoint)
    if layout == "saisa" and "visual_proj" in params and model.alignment == "saisa":
        # Stage 1's projector, which serves every layer.
        model = dataclasses.replace(model, projector=dataclasses.replace(model.projector, sharing="per_layer"))
        params = share_to_per_layer(params, model)
    return _Model(params, model, tokenizer, document["leaves"], sources)


def _pieces(model: _Model, layout: str, dtype: str | None) -> Iterator[_Piece]:
    """The checkpoint, and its tower if that goes into a folder of its own."""
    tower = _tower(model, layout)
    yield _piece(model, layout, "", tower, dtype)
    if tower:
        yield _piece(model, "hf-vision", tower, None, dtype)
    elif layout in TOWER_APART and "vision" in model.params:
        _params(model, "hf-vision", None)  # it stays where it is, and has to be what stands there


def _params(model: _Model, layout: str, dtype: str | None) -> ParamsSource:
    source, _ = model.source(layout)
    dtypes = dtype or (sidecar.recorded_dtypes(source) if source else None)
    parts = source.parts if source else _parts(model, layout)
    return ParamsSource(model.params, model.config, layout, parts=parts, dtype=dtypes)


def _parts(model: _Model, layout: str) -> tuple[str, ...]:
    """What a checkpoint of the layout holds if it does not go back to where it came from."""
    return ("decoder", "projector") if layout in TOWER_APART else layout_for(model.config, layout).parts


def _piece(model: _Model, layout: str, folder: str, tower: str | None, dtype: str | None) -> _Piece:
    source, kept_in = model.source(layout)
    params = _params(model, layout, dtype)
    tensors: dict[str, tuple[TensorSource, str]] = {}
    for key in params.names:
        tensors[source.names.get(key, key) if source else key] = (params, key)
    copied: tuple[Path, ...] = ()
    if source and kept_in:
        tensors |= {key: (params, other) for key, other in source.tied.items()}
        kept = sidecar.kept_tensors(kept_in)
        tensors |= {key: (kept, key) for key in source.kept} if kept else {}
        copied = tuple(sidecar.kept_files(kept_in))
    stored = dtype or params.dtype_name(params.names[0])
    torch_dtype = TORCH_DTYPES.get(stored, stored)
    raw = read_json(kept_in / "files" / CONFIG) if CONFIG in {file.name for file in copied} and kept_in else None
    tokenizer = None
    if raw and source and source.describes(model.config):
        changes = {"dtype" if "dtype" in raw else "torch_dtype": torch_dtype} if dtype else {}
        changes |= {"mm_vision_tower": tower} if tower else {}
        written = {CONFIG: raw | changes} if any(raw.get(name) != value for name, value in changes.items()) else {}
    else:
        tokenizer = model.tokenizer if layout != "hf-vision" else None
        written = _written(model, layout, tower or TOWER, torch_dtype)
    stale = tuple(source.stale(model.leaves)) if source else ()
    return _Piece(folder, tensors, copied, written, tokenizer, tuple(source.kept) if source else (), stale)


def _tower(model: _Model, layout: str) -> str | None:
    """The folder that a tower is written into; None: it is in the checkpoint, or stays where its config says."""
    if layout not in TOWER_APART or "vision" not in model.params:
        return None
    source, kept_in = model.source(layout)
    if source is None or kept_in is None or not source.describes(model.config):
        return TOWER
    if any("vision" in held.changed_parts(model.leaves) for held, _ in model.sources.values()):
        return TOWER  # it was trained: the one that the source's config names is another
    name = read_json(kept_in / "files" / CONFIG).get("mm_vision_tower", "")
    return name if name not in ("", ".", "..") and Path(name).name == name and "vision" in model.sources else None


def _vision(model: _Model, layout: str) -> VisionConfig:
    """The encoder as it is written: without the layers that are not used, unless the sidecar has kept them."""
    vision = model.config.vision
    source, _ = model.source("hf-vision" if layout in TOWER_APART else layout)
    if source and "vision" in source.kept.values():
        imported = source.imported_model().vision
        if imported.select_layer == vision.select_layer:
            return vision
    used = vision.num_used_layers
    stages = {"depths": vision.depths[:used], "widths": vision.widths[:used]}  # both are empty of a ViT
    return dataclasses.replace(vision, num_layers=used, select_layer=-1, **stages)


def _written(model: _Model, layout: str, tower: str, torch_dtype: str) -> dict[str, dict[str, Any]]:
    """The JSON files of a checkpoint, from our configuration."""
    vision = _vision(model, layout)
    files: dict[str, dict[str, Any]] = {}
    if layout in ("hf-vision", "llava-hf"):
        files[PREPROCESSOR_CONFIG] = preprocessor_to_hf(vision)
    if layout == "hf-vision":
        return files | {CONFIG: vision_to_hf(vision) | {"torch_dtype": torch_dtype}}
    config, ids, image_token = dataclasses.replace(model.config, vision=vision), {}, None
    if model.tokenizer is not None:
        ids = {name: getattr(model.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        image_token = _image_token(model) if layout == "llava-hf" else None
        files[GENERATION_CONFIG] = ids
    raw = (
        decoder_to_hf(config)
        if layout == "hf-llm"
        else multimodal_to_hf(config, layout, tower=tower, image_token=image_token)
    )
    return files | {CONFIG: raw | ids | {"torch_dtype": torch_dtype}}


def _image_token(model: _Model) -> int | None:
    """The id of <image>, which is added to the tokenizer if the vocabulary has room; None: it has none."""
    vocabulary = model.tokenizer.get_vocab()
    if IMAGE not in vocabulary and len(model.tokenizer) < model.config.vocab_size:
        model.tokenizer.add_tokens([IMAGE], special_tokens=True)
    return model.tokenizer.get_vocab().get(IMAGE)
