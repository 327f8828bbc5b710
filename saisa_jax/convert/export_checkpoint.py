"""Weights out: a finished model -> a directory that the official code and transformers load."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from saisa_jax import buckets
from saisa_jax.checkpoints import checksums, load_model, read_account
from saisa_jax.checkpoints.checksums import flatten
from saisa_jax.config import ModelConfig, VisionConfig
from saisa_jax.convert import sidecar
from saisa_jax.convert.chat_template import multimodal_chat_template
from saisa_jax.convert.configs import (
    TORCH_DTYPES,
    decoder_to_hf,
    features_to_hf,
    multimodal_to_hf,
    preprocessor_to_hf,
    processor_to_hf,
    saisa_to_hf,
    vision_to_hf,
)
from saisa_jax.convert.files.safetensors import DTYPES, nbytes
from saisa_jax.convert.files.tensors import TensorSource
from saisa_jax.convert.hf_json import (
    CONFIG,
    GENERATION_CONFIG,
    PREPROCESSOR_CONFIG,
    PROCESSOR_CONFIG,
    read_json,
    read_json_if_there,
    write_json,
)
from saisa_jax.convert.layouts import TOWER_APART, TOWER_PREFIX, layout_for
from saisa_jax.convert.official import fetches, official_notes, spell_for_transformers_4
from saisa_jax.convert.rows import ConvertError
from saisa_jax.convert.sidecar import Source
from saisa_jax.convert.target import check_room, check_target, written_whole
from saisa_jax.convert.write import SHARD_BYTES, CastSource, ParamsSource, write_shards
from saisa_jax.data.text.conversation import IMAGE, end_token_id
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.models.saisa import share_to_per_layer

# Of generation_config.json: transformers does not save a model that has them without do_sample.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
MODELING = Path(__file__).parent / "remote" / "modeling_saisa.py"  # the code of the layout hf
TOWER = "vision_tower"  # the folder of the tower, beside a checkpoint in the layout saisa or llava


@dataclass(frozen=True)
class Exported:
    """What an export has to say."""

    files: tuple[str, ...]
    restored: tuple[str, ...]  # tensors that were written back from the sidecar
    stale: tuple[str, ...]  # those of them whose part has been trained since the import
    notes: tuple[str, ...]  # what its readers need to know


@dataclass(frozen=True)
class _Model:
    """A finished model on the host."""

    params: dict[str, Any]
    config: ModelConfig
    tokenizer: Any
    end_tokens: tuple[int, ...]  # at which our generation stops
    template: str  # how it is spoken to
    system_prompt: str | None  # None: the template's own
    leaves: Mapping[str, Any]
    sources: dict[str, tuple[Source, Path]]

    def source(self, layout: str) -> tuple[Source, Path] | tuple[None, None]:
        """The account of the source that was imported from this layout, and its sidecar."""
        return next((found for found in self.sources.values() if found[0].layout == layout), (None, None))

    def changed(self, part: str) -> bool:
        """Whether a part has been trained since it was imported."""
        return any(part in source.changed_parts(self.leaves) for source, _ in self.sources.values())


@dataclass(frozen=True)
class _Tower:
    """Where the vision tower of a checkpoint of saisa or llava is."""

    folder: str  # that it is written into, within the export; "": it is not
    name: str  # in config.json


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
            spell_for_transformers_4(directory)
        for name, content in self.written.items():
            write_json(directory / name, content)


def export_checkpoint(
    checkpoint: str | Path,
    layout: str,
    to: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    readme: str = "",
) -> Exported:
    """Writes a finished model in a layout of `layouts.LAYOUTS`: tensors, config.json, tokenizer, preprocessor.

    A model that was imported from this layout gets back what its sidecar kept, its spellings, and its dtypes.

    Args:
      to: a directory that does not exist yet, or is empty; it appears under its name when it is whole.
      dtype: of all tensors; None: those of the import from this layout, or else the parameters' own.
      readme: the content of a README.md beside them; "": there is none.

    Raises:
      ConvertError: a model that the layout cannot say or has no place for, or a target that cannot be written; nothing
        was written then.
      CheckpointError: the checkpoint cannot be read.
      OSError: writing failed; nothing is left under the name.
    """
    target = check_target(to)
    model = _load(checkpoint, layout)
    pieces = tuple(_pieces(model, layout, dtype, target))
    check_room(sum(piece.nbytes for piece in pieces), target)
    with written_whole(target) as directory:
        for piece in pieces:
            piece.write(directory, shard_bytes)
        if readme:
            (directory / "README.md").write_text(readme)
        files = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    restored, stale = (tuple(key for piece in pieces for key in getattr(piece, name)) for name in ("restored", "stale"))
    notes = (*_notes(target, layout), *(() if dtype else _rounded(model, layout)))
    return Exported(tuple(files), restored, stale, notes)


def _load(checkpoint: str | Path, layout: str) -> _Model:
    document, config = read_account(checkpoint)
    model = config.model_for(document["metadata"]["stage"])
    sources = sidecar.read(checkpoint)
    params, _, tokenizer, _ = load_model(checkpoint)
    if layout == "saisa" and model.alignment == "saisa" and not model.per_layer_projectors and "visual_proj" in params:
        # Stage 1's projector, which serves every layer; of a low-rank one that is the MLP that it is to start from.
        kind = "mlp" if model.projector.kind == "low_rank" else model.projector.kind
        projector = dataclasses.replace(model.projector, kind=kind, sharing="per_layer")
        model = dataclasses.replace(model, projector=projector)
        params = share_to_per_layer(params, model)
    ends, template = model.end_token_ids, config.stage(document["metadata"]["stage"]).template
    if tokenizer is not None:
        template_end = end_token_id(template, tokenizer)
        ends = tuple(dict.fromkeys((tokenizer.eos_token_id, template_end, *ends)))
    return _Model(params, model, tokenizer, ends, template, config.data.system_prompt, document["leaves"], sources)


def _pieces(model: _Model, layout: str, dtype: str | None, to: epath.Path) -> Iterator[_Piece]:
    """The checkpoint, and its tower if that goes into a folder of its own."""
    tower = _find_tower(model, layout, to) if layout in TOWER_APART and "vision" in model.params else None
    yield _piece(model, layout, "", tower, dtype)
    if tower and tower.folder:
        yield _piece(model, "hf-vision", tower.folder, None, dtype)
    elif tower:
        _params(model, "hf-vision", None)  # it stays where it is, and has to be what stands there


def _params(model: _Model, layout: str, dtype: str | None) -> ParamsSource:
    source, _ = model.source(layout)
    dtypes: Any = dtype or ((sidecar.recorded_dtypes(source) if source else {}) | _dtypes_of_tower(model, layout))
    parts = source.parts if source else _parts(model, layout)
    return ParamsSource(model.params, model.config, layout, parts=parts, dtype=dtypes)


def _parts(model: _Model, layout: str) -> tuple[str, ...]:
    """What a checkpoint of the layout holds if it does not go back to where it came from."""
    return ("decoder", "projector") if layout in TOWER_APART else layout_for(model.config, layout).parts


def _imported_tower(model: _Model) -> tuple[Source, Path, dict[str, str]] | None:
    """The source of a tower that is still, to the bit or rounded, what was imported; None: there is none.

    Returns:
      the source, its sidecar, and by the source's spelling the tower's tensors as hf-vision calls them.
    """
    found = next(((source, path) for source, path in model.sources.values() if "vision" in source.parts), None)
    if found is None or model.changed("vision"):
        return None
    source, kept_in = found
    layout = layout_for(source.imported_model(), source.layout)
    keys = {name: layout.canonical(name) for name, part in source.kept.items() if part == "vision"}
    keys |= {name: key for key, name in source.names.items() if layout.part_of(key) == "vision"}
    return source, kept_in, {name: key.removeprefix(TOWER_PREFIX[source.layout]) for name, key in keys.items()}


def _dtypes_of_tower(model: _Model, layout: str) -> dict[str, Any]:
    """key -> dtype of a tower that is as it was imported, whatever the layout was."""
    tower = _imported_tower(model)
    if tower is None or layout not in TOWER_PREFIX:
        return {}
    source, _, keys = tower
    return {TOWER_PREFIX[layout] + key: DTYPES[source.dtypes[name]] for name, key in keys.items()}


def _tensors_of_tower(
    model: _Model, layout: str, names: Mapping[str, str], dtype: str | None
) -> dict[str, tuple[TensorSource, str]]:
    """Tensors of an imported tower that the parameters lack or hold rounded, as the layout and `names` call them."""
    tower = _imported_tower(model)
    if tower is None or layout not in TOWER_PREFIX:
        return {}
    source, kept_in, keys = tower
    unused = sidecar.kept_tensors(kept_in) if source.layout != layout else {}  # else they are written with the others
    found: dict[str, tuple[TensorSource, str]] = {}
    for name, held in (sidecar.rounded_tensors(kept_in) | unused).items():
        if name in keys:
            key = TOWER_PREFIX[layout] + keys[name]
            found[names.get(key, key)] = (CastSource(held, dtype) if dtype else held, name)
    return found


def _piece(model: _Model, layout: str, folder: str, tower: _Tower | None, dtype: str | None) -> _Piece:
    source, kept_in = model.source(layout)
    params = _params(model, layout, dtype)
    tensors: dict[str, tuple[TensorSource, str]] = {}
    for key in params.names:
        tensors[source.names.get(key, key) if source else key] = (params, key)
    copied: tuple[Path, ...] = ()
    if source and kept_in:
        tensors |= {key: (params, other) for key, other in source.tied.items()}
        tensors |= {key: (held, key) for key, held in sidecar.kept_tensors(kept_in).items()}
        copied = tuple(sidecar.kept_files(kept_in))
    if "vision" in (source.parts if source else _parts(model, layout)):
        tensors |= _tensors_of_tower(model, layout, source.names if source else {}, dtype)
    stored = dtype or params.dtype_name(params.names[0])
    torch_dtype = TORCH_DTYPES.get(stored, stored)
    raw = read_json(kept_in / "files" / CONFIG) if CONFIG in {file.name for file in copied} and kept_in else None
    written = _beside(model, layout, not folder, {file.name: file for file in copied})
    if raw and source and source.describes(model.config):
        changes = {"dtype" if "dtype" in raw else "torch_dtype": torch_dtype} if dtype else {}
        changes |= {"mm_vision_tower": tower.name} if tower else {}
        changes |= features_to_hf(model.config.vision) if layout == "hf-vision" and not folder else {}
        if any(raw.get(name) != value for name, value in changes.items()):
            written[CONFIG] = raw | changes
    else:
        written[CONFIG] = _config_json(model, layout, tower.name if tower else "", torch_dtype, not folder)
    tokenizer = None
    if layout != "hf-vision":
        kept = _tokenizer_files(model)
        carried = (*sidecar.TOKENIZER_FILES, *sidecar.TERMS)
        copied = (*(file for file in copied if file.name not in carried), *kept, *_kept(model, sidecar.TERMS))
        tokenizer = None if kept else model.tokenizer
    if layout == "hf":
        copied = (*(file for file in copied if file.name != MODELING.name), MODELING)
    stale = tuple(source.stale(model.leaves)) if source else ()
    restored = tuple(key for key, (held, _) in tensors.items() if held is not params)
    return _Piece(folder, tensors, copied, written, tokenizer, restored, stale)


def _tokenizer_files(model: _Model) -> tuple[Path, ...]:
    """The files of the tokenizer as they came, whatever the layout was; (): the model's tokenizer is another one.

    The program's own copy lacks `tokenizer.model`, the only kind that the original programs read.
    """
    files = _kept(model, sidecar.TOKENIZER_FILES)
    if files and model.tokenizer is not None:
        kept = load_tokenizer(files[0].parent)
        if kept.get_vocab() != model.tokenizer.get_vocab() or kept.chat_template != model.tokenizer.chat_template:
            return ()
    return files


def _kept(model: _Model, names: Sequence[str]) -> tuple[Path, ...]:
    """Files of these names from the decoder's source, whatever the layout was."""
    _, kept_in = model.sources.get("model", (None, None))
    return tuple(file for file in sidecar.kept_files(kept_in) if file.name in names) if kept_in else ()


def _find_tower(model: _Model, layout: str, to: epath.Path) -> _Tower:
    """A tower of the hub that has not been trained stays there; any other is written beside the checkpoint.

    Its name is absolute, since the original programs look for a relative one in the directory that they run in.
    """
    source, kept_in = model.source(layout)
    said = read_json_if_there(kept_in / "files" / CONFIG).get("mm_vision_tower", "") if source and kept_in else ""
    apart, _ = model.source("hf-vision")
    if not model.changed("vision"):
        for name, known in ((said, source), (apart.repository if apart else "", apart)):
            if known and fetches(name) and known.imported_model().vision == model.config.vision:
                return _Tower("", name)
    folder = Path(said).name or TOWER
    return _Tower(folder, str(buckets.absolute(to) / folder))


def _notes(to: epath.Path, layout: str) -> Iterator[str]:
    if layout == "saisa":
        for note in official_notes(to):
            yield f"the official SAISA program does not run it: {note}"
    if layout in TOWER_APART:
        name = read_json(to / CONFIG)["mm_vision_tower"]
        if Path(name).is_absolute():
            yield f"config.json names the tower {name}: say so there if you move the folder"


def _rounded(model: _Model, layout: str) -> Iterator[str]:
    """What of a frozen decoder its storage in training has rounded, and the sidecar does not hold: it is too large."""
    source, _ = model.source(layout)
    if source is None:
        return
    rounded = []
    for row in layout_for(model.config, layout).only([part for part in source.parts if part != "vision"]):
        leaf, known = model.leaves.get(row.path, {}), source.known.get(row.path, {})
        theirs = DTYPES[source.dtypes[source.names[row.keys[0]]]].name
        if known and theirs != leaf.get("dtype") and known.get(leaf.get("dtype")) == leaf.get("checksum"):
            array = flatten(model.params)[row.path].astype(theirs)
            rounded += [row.path] if checksums({"x": array})["x"] != known.get(theirs) else []
    if rounded:
        yield (
            f"training has kept these frozen parameters in {model.leaves[rounded[0]]['dtype']}, which does not hold "
            f"them to the bit; the model that it started from does: {', '.join(rounded)}"
        )


def _vision(model: _Model, layout: str) -> VisionConfig:
    """The encoder as it is written: without the layers that are not used, unless the sidecar has kept them."""
    vision = model.config.vision
    source, _ = model.source("hf-vision" if layout in TOWER_APART else layout)
    if source is None and (tower := _imported_tower(model)):
        source = tower[0]
    kept = source.imported_model().vision if source and "vision" in source.kept.values() else None
    if kept and kept.select_layer == vision.select_layer:
        return vision
    used = vision.num_used_layers
    stages = {"depths": vision.depths[:used], "widths": vision.widths[:used]}  # both are empty of a ViT
    return dataclasses.replace(vision, num_layers=used, select_layer=-1, **stages)


def _config_json(model: _Model, layout: str, tower: str, torch_dtype: str, alone: bool) -> dict[str, Any]:
    """The config.json of a checkpoint, from our configuration.

    Args:
      tower: its name, of saisa and llava.
      alone: no part of a checkpoint of saisa or llava.
    """
    vision = _vision(model, layout)
    if layout == "hf-vision":
        raw = vision_to_hf(vision) | (features_to_hf(vision) if alone else {})
    elif layout == "hf-llm":
        raw = decoder_to_hf(model.config) | _token_ids(model)
    elif layout == "hf":
        config = dataclasses.replace(model.config, vision=vision)
        raw = saisa_to_hf(config, _speaking(model), model.template, model.system_prompt) | _token_ids(model)
    else:
        token = _image_token(model) if layout == "llava-hf" and model.tokenizer is not None else None
        config = dataclasses.replace(model.config, vision=vision)
        raw = multimodal_to_hf(config, layout, tower=tower, image_token=token) | _token_ids(model)
    return raw | {"torch_dtype": torch_dtype}


def _token_ids(model: _Model) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id") if model.tokenizer is not None else ()
    return {name: getattr(model.tokenizer, name) for name in names}


def _beside(model: _Model, layout: str, alone: bool, copied: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """JSON files beside config.json that do not go out as they came: none came, or what they speak of has changed."""
    files: dict[str, dict[str, Any]] = {}
    came = copied.keys() & {PREPROCESSOR_CONFIG, PROCESSOR_CONFIG}
    if layout in ("hf-vision", "llava-hf", "hf") and (not came or model.changed("vision")):
        files[PREPROCESSOR_CONFIG] = preprocessor_to_hf(_vision(model, layout), pads=alone)
        if layout == "hf":
            files[PROCESSOR_CONFIG] = processor_to_hf(model.config.vision)
    trained = model.changed("decoder") or model.changed("projector")
    if layout == "hf-vision" or not model.end_tokens or (CONFIG in copied and not trained):
        return files
    kept = read_json(copied[GENERATION_CONFIG]) if GENERATION_CONFIG in copied else {}
    said = kept.get("eos_token_id")
    if set(said if isinstance(said, list) else [said]) != set(model.end_tokens):  # other words, another end
        sampling = () if kept.get("do_sample") else SAMPLING
        kept = {name: value for name, value in kept.items() if name not in sampling}
        first, *others = model.end_tokens
        files[GENERATION_CONFIG] = _token_ids(model) | kept | {"eos_token_id": [first, *others] if others else first}
    return files


def _image_token(model: _Model, beyond: bool = False) -> int | None:
    """The id of <image>, which is added to the tokenizer if the vocabulary has room; None: it has none.

    Args:
      beyond: add it even if its id is beyond the vocabulary.
    """
    vocabulary = model.tokenizer.get_vocab()
    if IMAGE not in vocabulary and (beyond or len(model.tokenizer) < model.config.vocab_size):
        model.tokenizer.add_tokens([IMAGE], special_tokens=True)
    return model.tokenizer.get_vocab().get(IMAGE)


def _speaking(model: _Model) -> int:
    """Gives the tokenizer the chat template and the <image> of the layout hf; its id, which no embedding is asked for.

    Raises:
      ConvertError: there is no tokenizer.
    """
    if model.tokenizer is None:
        raise ConvertError("the layout hf wants a tokenizer, and this model has none: import it with --tokenizer=DIR")
    model.tokenizer.chat_template = multimodal_chat_template(model.tokenizer, model.template, model.system_prompt)
    token = _image_token(model, beyond=True)
    assert token is not None
    return token
