"""Weights out: a finished model -> a directory that the official code and transformers load."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saisa_jax.checkpoints import load_model, read_account
from saisa_jax.config import ModelConfig, VisionConfig
from saisa_jax.convert import hf_write, sidecar
from saisa_jax.convert.checkpoint import check_room, check_target
from saisa_jax.convert.exporter import SHARD_BYTES, ParamsSource, write_shards
from saisa_jax.convert.files.safetensors import nbytes
from saisa_jax.convert.files.tensors import TensorSource
from saisa_jax.convert.hf_config import read_json
from saisa_jax.convert.sidecar import Source
from saisa_jax.convert.tables import table
from saisa_jax.data.text.conversation import IMAGE
from saisa_jax.models.saisa import share_to_per_layer

TOWER = "vision_tower"  # the folder of the tower, beside a checkpoint in the layout saisa or llava
CONFIG = "config.json"


@dataclass(frozen=True)
class Exported:
    """What an export has to say."""

    files: tuple[str, ...]
    restored: tuple[str, ...]  # tensors that were written back from the sidecar
    stale: tuple[str, ...]  # those of them whose part has been trained since the import


@dataclass(frozen=True)
class _Model:
    """A finished model on the host."""

    directory: Path
    params: dict[str, Any]
    config: ModelConfig
    tokenizer: Any
    leaves: Mapping[str, Any]
    sources: dict[str, tuple[Source, Path]]

    def source(self, layout: str) -> tuple[Source, Path] | None:
        return next((found for found in self.sources.values() if found[0].layout == layout), None)


def export_checkpoint(
    checkpoint: str | Path, layout: str, to: str | Path, *, dtype: str | None = None, shard_bytes: int = SHARD_BYTES
) -> Exported:
    """Writes a finished model in a layout of `tables.LAYOUTS`: tensors, config.json, tokenizer, preprocessor.

    A model that was imported from this layout gets back what its sidecar kept, its spellings, and its dtypes.

    Args:
      to: a directory that does not exist yet, or is empty; it appears under its name when it is whole.
      dtype: of all tensors; None: those of the import from this layout, or else the parameters' own.

    Raises:
      ConvertError: a model that the layout cannot hold, or a target that cannot be written.
      CheckpointError: the checkpoint cannot be read.
      OSError: writing failed; nothing is left under the name.
    """
    to = check_target(to)
    model = _load(checkpoint, layout)
    if layout in ("saisa", "llava") and "vision" in model.params:  # also of a tower that stays where it is
        ParamsSource(model.params, model.config, "hf-vision", parts=("vision",))
    unfinished = to.resolve().parent / f".{to.name}.unfinished"
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    try:
        exported = _write(model, layout, unfinished, dtype, shard_bytes)
        if to.exists():
            to.rmdir()
        unfinished.rename(to)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return exported


def _load(checkpoint: str | Path, layout: str) -> _Model:
    document, config = read_account(checkpoint)
    model = config.model_for(document["metadata"]["stage"])
    sources = sidecar.read(checkpoint)
    params, _, tokenizer, _ = load_model(checkpoint)
    if layout == "saisa" and "visual_proj" in params and model.alignment == "saisa":
        # Stage 1's projector, which serves every layer.
        model = dataclasses.replace(model, projector=dataclasses.replace(model.projector, sharing="per_layer"))
        params = share_to_per_layer(params, model)
    return _Model(Path(checkpoint), params, model, tokenizer, document["leaves"], sources)


def _write(model: _Model, layout: str, directory: Path, dtype: str | None, shard_bytes: int) -> Exported:
    """One checkpoint of the layout into an empty directory, and its tower into a folder of it if it needs one."""
    source, kept_in = model.source(layout) or (None, None)
    params = ParamsSource(
        model.params,
        model.config,
        layout,
        parts=source.parts if source else _parts(model, layout),
        dtype=dtype or (sidecar.recorded_dtypes(source) if source else None),
    )
    tensors: dict[str, tuple[TensorSource, str]] = {}
    for key in params.names:
        tensors[source.names.get(key, key) if source else key] = (params, key)
    if source and kept_in:
        tensors |= {key: (params, other) for key, other in source.tied.items()}
        kept = sidecar.kept_tensors(kept_in)
        tensors |= {key: (kept, key) for key in source.kept} if kept else {}
    check_room(sum(nbytes(held.dtype_name(key), held.shape(key)) for held, key in tensors.values()), directory)
    write_shards(tensors, directory, shard_bytes)
    tower = _tower(model, layout)
    _write_files(model, layout, directory, tower, dtype or params.dtype_name(params.names[0]), dtype is not None)
    restored, stale = (tuple(source.kept), tuple(source.stale(model.leaves))) if source else ((), ())
    if tower:
        (directory / tower).mkdir()
        inner = _write(model, "hf-vision", directory / tower, dtype, shard_bytes)
        restored, stale = (*restored, *inner.restored), (*stale, *inner.stale)
    files = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return Exported(tuple(files), restored, stale)


def _parts(model: _Model, layout: str) -> tuple[str, ...]:
    """What a checkpoint of the layout holds if it does not go back to where it came from."""
    if layout in ("saisa", "llava"):
        return ("decoder", "projector")  # the tower lies in a folder of its own
    return tuple(dict.fromkeys(row.part for row in table(model.config, layout).rows))


def _tower(model: _Model, layout: str) -> str | None:
    """The folder that a tower is written into; None: it is in the checkpoint, or stays where its config says."""
    if layout not in ("saisa", "llava") or "vision" not in model.params:
        return None
    source, kept_in = model.source(layout) or (None, None)
    if source is None or kept_in is None or not source.describes(model.config):
        return TOWER
    if any("vision" in held.changed_parts(model.leaves) for held, _ in model.sources.values()):
        return TOWER  # it was trained: the one that the source's config names is another
    name = read_json(kept_in / "files" / CONFIG).get("mm_vision_tower", "")
    return name if name not in ("", ".", "..") and Path(name).name == name and "vision" in model.sources else None


def _vision(model: _Model, layout: str) -> VisionConfig:
    """The encoder as it is written: without the layers that are not used, unless the sidecar has kept them."""
    vision = model.config.vision
    source, _ = model.source("hf-vision" if layout in ("saisa", "llava") else layout) or (None, None)
    if source and "vision" in source.kept.values():
        imported = source.imported_model().vision
        if imported.select_layer == vision.select_layer:
            return vision
    used = vision.num_used_layers
    stages = {"depths": vision.depths[:used], "widths": vision.widths[:used]}  # both are empty of a ViT
    return dataclasses.replace(vision, num_layers=used, select_layer=-1, **stages)


# --- the small files --------------------------------------------------------------------------------------------------


def _write_files(model: _Model, layout: str, directory: Path, tower: str | None, dtype: str, asked: bool) -> None:
    source, kept_in = model.source(layout) or (None, None)
    if kept_in:
        for file in sidecar.kept_files(kept_in):
            shutil.copyfile(file, directory / file.name)
    torch_dtype = hf_write.TORCH_DTYPES.get(dtype, dtype)
    path = directory / CONFIG
    if source and source.describes(model.config) and path.exists():
        raw = read_json(path)
        changes = {"dtype" if "dtype" in raw else "torch_dtype": torch_dtype} if asked else {}
        changes |= {"mm_vision_tower": tower} if tower and layout != "hf-vision" else {}
        if any(raw.get(name) != value for name, value in changes.items()):
            _write_json(path, raw | changes)
        return
    vision = _vision(model, layout)
    if model.tokenizer is not None and layout != "hf-vision":
        ids = {name: getattr(model.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        image_token = _image_token(model) if layout == "llava-hf" else None
        model.tokenizer.save_pretrained(directory)
    else:
        ids, image_token = {}, None
    config = dataclasses.replace(model.config, vision=vision)
    if layout == "hf-vision":
        raw = hf_write.vision_to_hf(vision)
    elif layout == "hf-llm":
        raw = hf_write.decoder_to_hf(config)
    else:
        raw = hf_write.multimodal_to_hf(config, layout, tower=tower or TOWER, image_token=image_token)
    _write_json(path, raw | ids | {"torch_dtype": torch_dtype})
    if ids:
        _write_json(directory / "generation_config.json", ids)
    if layout in ("hf-vision", "llava-hf"):
        _write_json(directory / "preprocessor_config.json", hf_write.preprocessor_to_hf(vision))


def _image_token(model: _Model) -> int | None:
    """The id of <image>, which is added to the tokenizer if the vocabulary has room; None: it has none."""
    vocabulary = model.tokenizer.get_vocab()
    if IMAGE not in vocabulary and len(model.tokenizer) < model.config.vocab_size:
        model.tokenizer.add_tokens([IMAGE], special_tokens=True)
    return model.tokenizer.get_vocab().get(IMAGE)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
