"""The sidecar of an imported model: what its source held besides the parameters, kept word for word.

sidecar/NAME/source.json           layout, spellings and dtypes of all tensors, and what the parameters were
sidecar/NAME/tensors.safetensors   the tensors that the model never reads
sidecar/NAME/rounded/...           the tower's tensors that bfloat16 does not hold: what is frozen is stored in it
sidecar/NAME/files/...             the source's small files

NAME is `model` for the checkpoint itself and `vision` for a tower that came from a directory of its own. Training hands
the sidecar on, so that an export to the same layout can write everything back, and say what no longer belongs together.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from saisa_jax import buckets
from saisa_jax.checkpoints import checksums, sidecar_files
from saisa_jax.config import DTYPES as COMPUTE_DTYPES
from saisa_jax.config import ModelConfig, VisionConfig, from_config_dict, to_dict, upgrade_saved
from saisa_jax.convert.files.safetensors import DTYPES, write_file
from saisa_jax.convert.files.tensors import TensorDirectory, TensorSource
from saisa_jax.convert.hf_json import CONFIG, GENERATION_CONFIG, PREPROCESSOR_CONFIG, PROCESSOR_CONFIG
from saisa_jax.convert.layouts import Layout
from saisa_jax.convert.match import Match
from saisa_jax.convert.rows import part_of_path

TENSORS = "tensors.safetensors"
ROUNDED = "rounded"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.json",
    "chat_template.jinja",
)
TERMS = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")  # that go with every copy
SMALL_FILES = (CONFIG, GENERATION_CONFIG, PREPROCESSOR_CONFIG, PROCESSOR_CONFIG, *TOKENIZER_FILES, *TERMS)
CONSTANTS = ("inv_freq", "position_ids")  # not learned, so they never go stale


@dataclass(frozen=True)
class Source:
    """A source that an import has read, or the sidecar's account of it.

    Attributes:
      layout: one of `layouts.LAYOUTS`.
      parts: those that were read from it.
      names: canonical key -> the source's spelling, of every tensor that became part of a parameter.
      dtypes: the source's spelling -> dtype, of every tensor.
      tied: the source's spelling -> the canonical key of the tensor that it equals; written from there on export.
      kept: the source's spelling -> part, of the tensors in the sidecar.
      known: path -> {dtype: checksum} of the parameters as they were imported.
      model: the model's configuration then.
      repository: of the hub, `org/name`; "": a directory or a file.
    """

    layout: str
    parts: tuple[str, ...]
    names: dict[str, str]
    dtypes: dict[str, str]
    tied: dict[str, str]
    kept: dict[str, str]
    known: dict[str, dict[str, int]]
    model: dict[str, Any]
    repository: str = ""

    def changed_parts(self, leaves: Mapping[str, Mapping[str, Any]]) -> set[str]:
        """Parts whose parameters are not, to the bit, those that were imported."""
        return {
            part_of_path(path)
            for path, known in self.known.items()
            if path not in leaves or known.get(leaves[path]["dtype"]) != leaves[path]["checksum"]
        }

    def stale(self, leaves: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Tensors in the sidecar whose part has changed since."""
        changed = self.changed_parts(leaves)
        return [key for key, part in self.kept.items() if part in changed and not key.endswith(CONSTANTS)]

    def describes(self, config: ModelConfig) -> bool:
        """Whether the source's config.json still describes what of the model goes back into its layout."""
        return _described(self.imported_model(), self.layout) == _described(config, self.layout)

    def imported_model(self) -> ModelConfig:
        """The model's configuration when it was imported."""
        return from_config_dict(ModelConfig, upgrade_saved({"model": self.model})["model"])


def _described(config: ModelConfig, layout: str) -> ModelConfig | VisionConfig:
    """What a config.json of the layout speaks of; how a model is run on a device is never in it."""
    if layout == "hf-vision":
        return config.vision
    names = ["dtype", "param_dtype", "remat_policy", "scan_layers", "attention_impl", "lora", "end_token_ids"]
    if layout == "hf-llm":
        names += ["vision", "visual_layers", "projector", "alignment"]
    return dataclasses.replace(config, **{name: getattr(ModelConfig(), name) for name in names})


def describe_source(
    tensors: TensorSource, layout: Layout, parts: Sequence[str], match: Match, repository: str = ""
) -> Source:
    """What the sidecar says of a source; `known` and `model` are filled in by `write`."""
    canonical = {name: key for key, name in match.spelt.items()}
    tied = {match.spelt[key]: other for key, other in layout.tied if key in match.spelt}
    return Source(
        layout=layout.name,
        parts=tuple(parts),
        names={key: name for key, name in match.spelt.items() if name not in match.ignored},
        dtypes={name: tensors.dtype_name(name) for name in tensors.names},
        tied=tied,
        kept={name: layout.part_of(canonical[name]) for name in match.ignored if name not in tied},
        known={},
        model={},
        repository=repository,
    )


def write(
    directory: Path,
    tensors: TensorSource,
    source: Source,
    layout: Layout,
    config: ModelConfig,
    params: Mapping[str, Any],
    leaves: Mapping[str, Mapping[str, Any]],
    tokenizer: Path | None = None,
) -> None:
    """Writes the sidecar of one source.

    Args:
      directory: `.../sidecar/NAME`.
      params: the model's, by path.
      leaves: their account: dtypes and checksums.
      tokenizer: as of `small_files`.
    """
    known: dict[str, dict[str, int]] = {}
    for row in layout.only(source.parts):
        leaf = leaves[row.path]
        known[row.path] = {leaf["dtype"]: leaf["checksum"]}
        theirs = source.dtypes[source.names[row.keys[0]]]
        # Training stores what is frozen in another dtype, bfloat16 mostly.
        others = {DTYPES[theirs].name, "bfloat16", *(COMPUTE_DTYPES if row.part == "vision" else ())}
        for dtype in sorted(others - {leaf["dtype"]}):
            known[row.path] |= {dtype: checksums({"x": params[row.path].astype(dtype)})["x"]}
    source = dataclasses.replace(source, known=known, model=to_dict(config))
    (directory / "files").mkdir(parents=True)
    if source.kept:
        specs = [(key, tensors.dtype_name(key), tensors.shape(key)) for key in source.kept]
        write_file(directory / TENSORS, specs, tensors.read)
    rows = layout.only(("vision",)) if "vision" in source.parts else ()
    rounded = [source.names[key] for row in rows for key in row.keys if _rounded(tensors.read(source.names[key]))]
    if rounded:
        specs = [(key, tensors.dtype_name(key), tensors.shape(key)) for key in rounded]
        (directory / ROUNDED).mkdir()
        write_file(directory / ROUNDED / TENSORS, specs, tensors.read)
    for name, path in small_files(tensors.where, tokenizer).items():
        shutil.copyfile(path, directory / "files" / name)
    (directory / "source.json").write_text(json.dumps(dataclasses.asdict(source), indent=1) + "\n")


def _rounded(tensor: np.ndarray) -> bool:
    return not np.array_equal(tensor.astype(jnp.bfloat16).astype(tensor.dtype), tensor)


def small_files(where: Path, tokenizer: Path | None = None) -> dict[str, Path]:
    """A source's files besides tensors, those that are known: configs, tokenizer, templates, licence.

    Args:
      tokenizer: a directory whose tokenizer the model has instead of the source's own.
    """
    files = {name: where / name for name in SMALL_FILES}
    if tokenizer is not None:
        files |= {name: tokenizer / name for name in TOKENIZER_FILES}
    return {name: path for name, path in files.items() if path.is_file()}


def read(checkpoint: str | Path) -> dict[str, tuple[Source, Path]]:
    """The sources of a finished model's sidecar: NAME -> (account, directory); {} if it was not imported.

    Raises:
      CheckpointError, DamagedError: no finished model, or a sidecar that is not what was saved.
    """
    found = {}
    for file in buckets.local_copies(sidecar_files(checkpoint), checkpoint):
        if file.name == "source.json":
            raw = json.loads(file.read_text())
            raw["parts"] = tuple(raw["parts"])
            found[file.parent.name] = (Source(**raw), file.parent)
    return found


def kept_tensors(directory: Path) -> dict[str, TensorSource]:
    """The tensors of one source's sidecar that the model never reads, by the source's spelling."""
    return _tensors(directory)


def rounded_tensors(directory: Path) -> dict[str, TensorSource]:
    """The tensors as they came of which the parameters may have been rounded, by the source's spelling."""
    return _tensors(directory / ROUNDED)


def _tensors(directory: Path) -> dict[str, TensorSource]:
    source = TensorDirectory(directory) if (directory / TENSORS).exists() else None
    return dict.fromkeys(source.names, source) if source else {}


def kept_files(directory: Path) -> list[Path]:
    """The small files of one source's sidecar; a source of tensors alone (GGUF) has none."""
    where = directory / "files"
    return sorted(where.iterdir()) if where.is_dir() else []


def recorded_dtypes(source: Source) -> dict[str, Any]:
    """canonical key -> dtype, as the source had it."""
    return {key: DTYPES[source.dtypes[name]] for key, name in source.names.items()}
