"""Weights in: somebody else's files -> a finished model of ours that answers, or that training can start from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Sharding, SingleDeviceSharding

from saisa_jax import buckets
from saisa_jax.checkpoints import save_model
from saisa_jax.checkpoints.checksums import flatten, unflatten_dict
from saisa_jax.config import DTYPES as COMPUTE_DTYPES
from saisa_jax.config import (
    STAGES,
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    ProjectorConfig,
    StageConfig,
    VisionConfig,
)
from saisa_jax.convert import sidecar
from saisa_jax.convert.chat_template import find_chat_template, find_end_tokens
from saisa_jax.convert.configs import config_from_hf, with_image_size
from saisa_jax.convert.files.hub import repository, resolve
from saisa_jax.convert.files.open import open_checkpoint, open_projector
from saisa_jax.convert.files.safetensors import DTYPES, nbytes
from saisa_jax.convert.hf_json import CONFIG, GENERATION_CONFIG, read_json_if_there
from saisa_jax.convert.layouts import projector_layout
from saisa_jax.convert.match import layout_of, match, settle_head
from saisa_jax.convert.read import Piece, find_pieces
from saisa_jax.convert.rows import ConvertError
from saisa_jax.convert.target import check_room, check_target
from saisa_jax.data.text.conversation import IMAGE
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.models.saisa import init_params


@dataclass(frozen=True)
class ImportOptions:
    """What `convert import` is told.

    Attributes:
      source: a whole multimodal checkpoint, or an LLM: a directory, a GGUF file or a repository of the hub.
      vision: the vision tower, where the source does not hold it.
      base: of a source that is a LoRA adapter; None: the one that it names.
      projector: of an LLM and a tower, trained already (`mm_projector.bin`): a start of stage 2.
      layout: of the source; None: told from its tensors.
      dtype: of the parameters; None: that of the files.
      template: None: told from the tokenizer.
      system_prompt: None: the one in the tokenizer's chat template, or else the template's.
      tokenizer: a directory, or "easy_vqa"; None: the source's own; "none": the model has none.
      alignment: what the model is to be; None: what its layout says, or SAISA of an LLM and a tower.
      visual_layers: of SAISA, the layers that see the image; None: all.
      frozen_prefix: as `ModelConfig.frozen_prefix`.
      select_layer: the tower's hidden state that is used, where the source does not say.
      image_size: of the pictures, if other than the tower was trained on: its positions are resampled.
      seed: of the fresh projectors.
      allow_nonfinite: import weights that hold inf or NaN, with a warning.
    """

    source: str
    vision: str | None = None
    base: str | None = None
    projector: str | None = None
    layout: str | None = None
    dtype: str | None = None
    template: str | None = None
    system_prompt: str | None = None
    tokenizer: str | None = None
    alignment: str | None = None
    visual_layers: tuple[int, ...] | None = None
    frozen_prefix: bool = False
    select_layer: int | None = None
    image_size: int | None = None
    seed: int = 0
    allow_nonfinite: bool = False


@dataclass(frozen=True)
class ImportPlan:
    """An import before anything is read or written."""

    model: ModelConfig  # as stage 2 and inference see it
    stage: str  # whose template and sharing the result has
    pieces: tuple[Piece, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(part for piece in self.pieces for part in piece.parts)


def stored_dtype(piece: Piece) -> np.dtype:
    """The dtype of a source's decoder or tower: of the first tensor that is read."""
    key = piece.layout.only(piece.parts)[0].keys[0]
    return DTYPES[piece.tensors.dtype_name(piece.match.spelt[key])]


def plan_import(options: ImportOptions) -> ImportPlan:
    """Reads configs and headers, and checks that every tensor is there.

    Raises:
      ConvertError: whatever does not fit, before anything was written.
    """
    source = resolve(options.source)
    vision = resolve(options.vision) if options.vision else None
    tensors = open_checkpoint(source, options.base)
    where = tensors.where
    layout = options.layout or layout_of(tensors)
    if layout == "hf-vision":
        raise ConvertError(f"{where} is a vision encoder alone; name it as --vision, and an LLM as --llm")
    model = config_from_hf(where, layout=layout, vision=vision, select_layer=options.select_layer, raw=tensors.config())
    model = settle_head(tensors, model, layout)
    if options.image_size:
        model = dataclasses.replace(model, vision=resized(model.vision, options.image_size))
    model = _aligned(model, layout, options)
    stage = STAGES[0] if layout == "hf-llm" and vision else STAGES[-1]
    pieces = find_pieces(tensors, model, layout, vision, options.dtype)
    if options.projector:
        if layout != "hf-llm" or vision is None:
            raise ConvertError("--projector belongs to an LLM and a tower: --llm=DIR --vision=DIR --projector=FILE")
        pieces += (_projector_piece(resolve(options.projector), model, options.dtype),)
    exact = np.dtype(options.dtype or stored_dtype(pieces[0])).name
    activations = exact if exact in COMPUTE_DTYPES else "float32"
    return ImportPlan(dataclasses.replace(model, dtype=activations), stage, pieces)


def _aligned(model: ModelConfig, layout: str, options: ImportOptions) -> ModelConfig:
    """The model as the one that it is to be: a layout says how many projectors there are, and not what reads them.

    Raises:
      ConvertError: the layout's projectors are not those of that alignment, or other options do not fit it.
    """
    alignment, projector = options.alignment or model.alignment, model.projector
    if alignment == "flamingo":
        raise ConvertError(
            "--as=flamingo: no layout holds cross layers, without which it sees no image; import it without --as, and "
            "train them from there: --config=configs/flamingo_vicuna_7b.py --config.init_from=IMPORT"
        )
    if layout == "hf-llm":
        projector = ProjectorConfig(sharing="per_layer" if alignment == "saisa" else "shared")
    elif model.per_layer_projectors and alignment != "saisa":
        raise ConvertError(
            f"--as={alignment}: {options.source} has a projector for each layer, which only saisa reads; leave out --as"
        )
    layers = model.visual_layers if options.visual_layers is None else options.visual_layers
    try:
        return dataclasses.replace(
            model,
            alignment=alignment,
            projector=projector,
            visual_layers=layers,
            frozen_prefix=options.frozen_prefix or model.frozen_prefix,
        )
    except ConfigError as error:
        raise ConvertError(str(error)) from error


def _projector_piece(path: Path, model: ModelConfig, dtype: str | None) -> Piece:
    tensors, rows = open_projector(path), projector_layout(model)
    kind = read_json_if_there(tensors.where / CONFIG).get("mm_projector_type") or "mlp2x_gelu"
    if kind != "mlp2x_gelu":
        raise ConvertError(f"{tensors.where / CONFIG}: mm_projector_type={kind!r} is not supported, only 'mlp2x_gelu'")
    found = match(tensors, rows, ("projector",), dtype)
    found.checked()
    return Piece("projector", tensors, rows, ("projector",), found)


def resized(vision: VisionConfig, image_size: int) -> VisionConfig:
    """An encoder for images of another size than it was trained on.

    Raises:
      ConvertError: no patch of it fits.
    """
    try:
        return with_image_size(vision, image_size)
    except ConfigError as error:
        raise ConvertError(f"--image_size={image_size}: {error}") from error


def import_checkpoint(options: ImportOptions, to: str | Path, sharding: Any = None) -> ImportPlan:
    """Writes a finished model that holds what the sources hold, and a sidecar with the rest of them.

    Parameters are read tensor by tensor into their sharding: beside them, at most one parameter is held twice.

    Args:
      to: a directory that does not exist yet, or is empty.
      sharding: where the parameters go meanwhile: one sharding for all, or a tree of them; None: one CPU device.

    Raises:
      ConvertError: sources that do not fit, or a target that cannot be written; nothing is left of it.
      CheckpointError: writing failed; nothing is left of it.
      DataError: a tokenizer that cannot be read.
    """
    target = check_target(to)
    plan = plan_import(options)
    tokenizer = _tokenizer(options, plan)
    config = _config(options, plan, tokenizer, target)
    _check_room(plan, options, target)
    flat = _read(plan, options, _places(sharding))
    params = unflatten_dict(flat)
    if "projector" not in plan.parts and "vision" in plan.parts:
        params["visual_proj"] = _fresh_projector(config.model_for(STAGES[0]), options.seed)

    def attach(directory: epath.Path, leaves: Mapping[str, Any]) -> None:
        with buckets.Mirror(directory / "sidecar") as mirror:
            write_sidecars(mirror.local, leaves)

    def write_sidecars(directory: Path, leaves: Mapping[str, Any]) -> None:
        for piece in plan.pieces:
            if piece.name == "projector":  # all of it is in the parameters
                continue
            named = repository((options.vision if piece.name == "vision" else options.source) or "")
            source = sidecar.describe_source(piece.tensors, piece.layout, piece.parts, piece.match, named)
            other = Path(options.tokenizer or "none")  # a directory, or a word
            tokens = other if piece.name == "model" and other.is_dir() else None
            sidecar.write(
                directory / piece.name, piece.tensors, source, piece.layout, config.model, flat, leaves, tokens
            )

    imported = {
        "from": [str(piece.tensors.where) for piece in plan.pieces],
        "layouts": [piece.layout.name for piece in plan.pieces],
        "parts": plan.parts,
    }
    save_model(target, params, config, tokenizer, {"stage": plan.stage, "imported": imported}, attach)
    return plan


def _read(plan: ImportPlan, options: ImportOptions, place: Any) -> dict[str, Any]:
    flat = {}
    for piece in plan.pieces:
        for path, array in piece.read(options.dtype, options.allow_nonfinite):
            flat[path] = place(path, array)
            del array  # or it would be held while the next one is read
    return flat


def _places(sharding: Any) -> Any:
    if sharding is None:
        sharding = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    each = None if isinstance(sharding, Sharding) else flatten(sharding)

    def place(path: str, array: np.ndarray) -> jax.Array:
        where = sharding if each is None else each[path]
        placed = jax.make_array_from_callback(array.shape, where, lambda index: array[index])
        return jax.block_until_ready(placed)  # before the next one is read

    return place


def _fresh_projector(config: ModelConfig, seed: int) -> Any:
    """One projector for all layers, as stage 1 trains it; the rest of the initialisation is never computed."""
    make = jax.jit(lambda key: init_params(config, key)["visual_proj"])
    return make(jax.random.key(seed))


def _tokenizer(options: ImportOptions, plan: ImportPlan) -> Any:
    source = plan.pieces[0].tensors
    if options.tokenizer == "none":
        return None
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else source.tokenizer()
    if tokenizer is None:
        raise ConvertError(f"{source.where} holds no tokenizer: say --tokenizer=DIR, or --tokenizer=none to go without")
    if len(tokenizer.get_vocab().keys() - {IMAGE}) > plan.model.padded_vocab_size:  # no embedding is asked for an image
        raise ConvertError(
            f"the tokenizer has {len(tokenizer)} tokens, and the model's vocabulary room for {plan.model.vocab_size}"
        )
    return tokenizer


def _config(options: ImportOptions, plan: ImportPlan, tokenizer: Any, to: epath.Path) -> Config:
    template, system_prompt = options.template or "vicuna_v1", options.system_prompt
    source, sharing = plan.pieces[0].tensors, plan.model.projector.sharing
    if plan.pieces[0].layout.name == "hf":
        said = source.config()
        template = options.template or said["template"]
        system_prompt = said["system_prompt"] if system_prompt is None else system_prompt
    elif tokenizer is not None:
        multimodal = "projector" in plan.pieces[0].parts
        template, system_prompt = find_chat_template(tokenizer, multimodal, options.template, options.system_prompt)
    generation_config = read_json_if_there(source.where / GENERATION_CONFIG)
    ends = find_end_tokens(source.config(), generation_config, tokenizer, plan.model.vocab_size)
    return Config(
        name=to.name,
        model=dataclasses.replace(plan.model, end_token_ids=ends),
        data=DataConfig(system_prompt=system_prompt, tokenizer=str(buckets.absolute(to) / "tokenizer")),
        finetune=StageConfig(template=template, sharing=sharing),
    )


def _check_room(plan: ImportPlan, options: ImportOptions, to: epath.Path) -> None:
    needed = 0
    for piece in plan.pieces:
        width = np.dtype(options.dtype or stored_dtype(piece)).itemsize
        needed += sum(int(np.prod(row.shape)) * width for row in piece.layout.only(piece.parts))
        ignored = piece.match.ignored
        tower = [key for row in piece.layout.only(("vision",)) for key in row.keys if "vision" in piece.parts]
        kept = (*ignored, *(piece.match.spelt[key] for key in tower))
        needed += sum(nbytes(piece.tensors.dtype_name(key), piece.tensors.shape(key)) for key in kept)
    check_room(needed, to)
