"""A finished model: a directory that needs nothing else.

model.json    metadata, number of parameters, shape, dtype and checksum of every parameter, checksums of the other files
config.json   the configuration of the run
params/       the arrays
tokenizer/    a Hugging Face tokenizer; absent if there is none
sidecar/      what else an imported checkpoint held (see `convert/sidecar.py`); absent if nothing
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Sharding, SingleDeviceSharding

from saisa_jax import buckets
from saisa_jax.checkpoints import storage
from saisa_jax.checkpoints.checksums import (
    account,
    damaged,
    describe,
    differences,
    flatten,
    seal,
    unflatten_dict,
    unseal,
)
from saisa_jax.checkpoints.storage import CheckpointError, DamagedError
from saisa_jax.config import Config, ConfigError, from_saved, to_dict

SIDECAR = "sidecar"
PARTS = frozenset({"config.json", "params", "tokenizer", SIDECAR})  # what may lie there before `model.json` does
# Writes further files into the directory of an unfinished model: (directory, account of the parameters).
Attach = Callable[[epath.Path, Mapping[str, Any]], None]


def save_model(
    directory: str | os.PathLike[str],
    params: Any,
    config: Config,
    tokenizer: Any,
    metadata: Mapping[str, Any],
    attach: Attach | None = None,
) -> None:
    """Writes a finished model, under its final name only when it is complete.

    It is written beside `directory` and renamed; a model that was there before is replaced. Every process calls this;
    the first one writes the small files. A bucket has no directories to rename: there the older model goes first, and
    `model.json`, which makes a model of what lies there, comes last (`is_model`).

    Args:
      params: nested dictionaries of arrays, on any mesh.
      tokenizer: has `save_pretrained`; None: the model has none.
      metadata: JSON-ready.
      attach: called in the first process; what it writes is checksummed like the other files.

    Raises:
      CheckpointError: something else has that name, or writing failed.
    """
    final = buckets.absolute(directory)
    remote = buckets.is_remote(final)
    unfinished, old = final if remote else _sibling(final, "unfinished"), _sibling(final, "old")
    strange = {path.name for path in buckets.children(final)} - (PARTS if remote else set())
    if strange and not is_model(final):
        raise CheckpointError(f"{final} holds something other than a model ({_names(final)}); choose another directory")
    leaves = account(params)
    try:
        _on_first(lambda: _clear(final) if remote else _prepare(final, unfinished, old))
        storage.write_tree(unfinished / "params", params)
        _on_first(lambda: _write_files(unfinished, leaves, config, tokenizer, metadata, attach))
        if not remote:
            _on_first(lambda: _put_in_place(final, unfinished, old))
    except Exception as error:  # Orbax raises almost anything
        if jax.process_index() == 0:
            buckets.remove(unfinished)
        raise CheckpointError(f"the model was not saved in {final}: {storage.first_line(error)}") from error


def local_model(workdir: str | os.PathLike[str], stage: str) -> epath.Path:
    """Where a stage of a run leaves its finished model."""
    return epath.Path(workdir) / stage / "model"


def is_model(directory: str | os.PathLike[str]) -> bool:
    """Whether a finished model lies there: its `model.json` is written last."""
    return (epath.Path(directory) / "model.json").exists()


def load_model(
    directory: str | os.PathLike[str],
    *,
    sharding: Any = None,
    abstract: Any = None,
    dtype: Any = None,
    partial: bool = False,
) -> tuple[Any, Config, Any, dict[str, Any]]:
    """Reads a finished model, written on any mesh.

    Args:
      directory: what `save_model` was given.
      sharding: where the parameters go: one sharding for all, a tree of them, or a function that makes either of
        (config, metadata); None: one CPU device, or where `abstract` says.
      abstract: the expected parameters (`shape`, `dtype`, perhaps `sharding`); the stored ones must have these paths
        and shapes, and are cast to these dtypes. None: as they are stored.
      dtype: cast parameters of floating type to this one, after their checksums were compared.
      partial: `abstract` names some of the parameters alone, and no others are read.

    Returns:
      (params, config, tokenizer or None, metadata).

    Raises:
      CheckpointError: no such directory, no model in it, a configuration that this version does not know, or parameters
        of other shapes than those of `abstract`, every one listed.
      DamagedError: files that are missing, cut short or changed, by name; arrays by path.
    """
    where = buckets.absolute(directory)
    document = _read_document(where)
    stored = document["leaves"]
    expected = describe(abstract) if abstract is not None else stored
    if partial:
        stored = {path: leaf for path, leaf in stored.items() if path in expected}
    lines = differences(stored, expected, dtypes=False)
    if lines:
        raise CheckpointError(f"{where} is of another model: {'; '.join(lines)}")
    config, tokenizer = _read_config(where, document["files"]), _read_tokenizer(where, document["files"])

    if callable(sharding):
        sharding = sharding(config, document["metadata"])
    places = _places(stored, sharding, abstract)
    template = {
        path: jax.ShapeDtypeStruct(tuple(leaf["shape"]), leaf["dtype"], sharding=places[path])
        for path, leaf in stored.items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        stored_tree = storage.stored_tree(template)
        read = _read_part if partial else checkpointer.restore
        restored = storage.read(f"params of {where}", lambda: read(where / "params", stored_tree))
    flat = storage.complete(restored, template)
    del restored
    bad = damaged(flat, stored)
    if bad:
        raise DamagedError(f"{where} is damaged; other values than were saved: {', '.join(bad)}")
    for path in flat:  # one after the other, so that there is never a second copy of all
        flat[path] = _cast(flat[path], dtype or expected[path]["dtype"])
    return unflatten_dict(flat), config, tokenizer, document["metadata"]


def _read_part(path: epath.Path, tree: Any) -> Any:
    """As `StandardCheckpointer.restore`, of some of the arrays."""
    places = ocp.checkpoint_utils.construct_restore_args(tree)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(tree, restore_args=places, partial_restore=True))


def read_account(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], Config]:
    """The description of a finished model, without its arrays: the content of model.json, and the configuration.

    Raises:
      CheckpointError, DamagedError: as `load_model`.
    """
    where = buckets.absolute(directory)
    document = _read_document(where)
    return document, _read_config(where, document["files"])


def sidecar_files(directory: str | os.PathLike[str]) -> list[epath.Path]:
    """The files of a finished model's sidecar, which are checked to be what was saved.

    Raises:
      DamagedError: one that is missing or changed, by name.
    """
    where = buckets.absolute(directory)
    files = _read_document(where)["files"]
    found = []
    for name in sorted(name for name in files if name.startswith(f"{SIDECAR}/")):
        try:
            seen = _crc32(where / name)
        except OSError as error:
            raise DamagedError(f"{where / name} cannot be read: {error}") from error
        if seen != files[name]:
            raise DamagedError(f"{where / name} is damaged: it is not what was saved")
        found.append(where / name)
    return found


def copy_sidecar(source: str | os.PathLike[str]) -> Attach:
    """For `save_model(attach=)`: copies the sidecar of the model that training started from.

    If the sidecar is missing or damaged by then, a warning is logged and the model is saved without it.
    """

    def attach(directory: epath.Path, leaves: Mapping[str, Any]) -> None:
        try:
            files, root = sidecar_files(source), buckets.absolute(source)
        except CheckpointError as error:
            logging.warning("the sidecar of %s is not copied: %s", source, error)
            return
        for file in files:
            target = directory / file.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.copy(target)

    return attach


# --- writing ---------------------------------------------------------------------------------------------------------


def _sibling(final: epath.Path, kind: str) -> epath.Path:
    return final.parent / f".{final.name}.{kind}"


def _on_first(act: Callable[[], None]) -> None:
    """Runs in the first process while the others wait for it."""
    if jax.process_index() == 0:
        act()
    multihost_utils.sync_global_devices("saisa_jax.save_model")


def _clear(final: epath.Path) -> None:
    """Removes a model, or a part of one, from a bucket; from its first moment on there is none."""
    (final / "model.json").unlink(missing_ok=True)
    buckets.remove(final)


def _prepare(final: epath.Path, unfinished: epath.Path, old: epath.Path) -> None:
    """Removes what a killed save has left; the model that it was about to replace gets its name back."""
    buckets.remove(unfinished)
    if old.exists() and not final.exists():
        old.rename(final)
    elif old.exists():
        old.rmtree()
    unfinished.mkdir(parents=True)


def _put_in_place(final: epath.Path, unfinished: epath.Path, old: epath.Path) -> None:
    if final.exists():
        final.rename(old)
    unfinished.rename(final)
    buckets.remove(old)


def _write_files(
    directory: epath.Path,
    leaves: Mapping[str, Mapping[str, Any]],
    config: Config,
    tokenizer: Any,
    metadata: Mapping[str, Any],
    attach: Attach | None,
) -> None:
    contents = {"config.json": (json.dumps(to_dict(config), indent=2) + "\n").encode()}
    if tokenizer is not None:
        with tempfile.TemporaryDirectory() as local:  # save_pretrained writes to disks only
            tokenizer.save_pretrained(local)
            files = sorted(path for path in Path(local).rglob("*") if path.is_file())
            contents |= {f"tokenizer/{path.relative_to(local).as_posix()}": path.read_bytes() for path in files}
    for name, content in contents.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    files = {name: zlib.crc32(content) for name, content in contents.items()}
    if attach is not None:
        attach(directory, leaves)
        sidecar = buckets.walk(directory / SIDECAR)
        files |= {path.relative_to(directory).as_posix(): _crc32(path) for path in sidecar}
    document = {
        **storage.header(),
        "parameters": sum(math.prod(leaf["shape"]) for leaf in leaves.values()),
        "metadata": metadata,
        "files": files,
        "leaves": leaves,
    }
    (directory / "model.json").write_text(json.dumps(seal(document), indent=2) + "\n")


def _crc32(path: epath.Path) -> int:
    """Of a file that may be too large to be held."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(2**24):
            value = zlib.crc32(piece, value)
    return value


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_document(where: epath.Path) -> dict[str, Any]:
    if not where.exists():
        old = _sibling(where, "old")
        hint = f"; an interrupted save has left the model that was there before as {old}: rename it"
        raise CheckpointError(f"there is no directory {where}{hint if old.exists() else ''}")
    path = where / "model.json"
    if not path.exists():
        seen = _names(where) if where.is_dir() else "a file"
        near = [where / name for name in ("model", "finetune/model", "pretrain/model") if (where / name).exists()]
        hint = f"; did you mean {near[0]}?" if near else ""
        raise CheckpointError(
            f"{where} is not a model of saisa_jax: expected model.json, config.json, params and tokenizer, found "
            f"{seen or 'nothing'}{hint}"
        )
    try:
        document = unseal(json.loads(path.read_text()))
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: {error}") from error
    storage.check_format(document, str(where))
    # A checksum is not a signature: no name may point outside the directory.
    outside = [name for name in document["files"] if {"", ".", ".."} & set(re.split(r"[/\\]", name))]
    if outside:
        raise DamagedError(f"{path} names files outside of its directory: {', '.join(outside)}")
    return document


def _read_config(where: epath.Path, files: Mapping[str, int]) -> Config:
    path = where / "config.json"
    content = _read_bytes(path)
    if zlib.crc32(content) != files["config.json"]:
        logging.warning("%s was changed after the model was saved", path)  # by hand, which is allowed
    try:
        return from_saved(json.loads(content))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: {error}") from error


def _read_tokenizer(where: epath.Path, files: Mapping[str, int]) -> Any:
    names = [name for name in files if name.startswith("tokenizer/")]
    if not names:
        return None
    from transformers import AutoTokenizer  # slow to import

    with tempfile.TemporaryDirectory() as local:  # from_pretrained reads from disks only
        for name in names:
            content = _read_bytes(where / name)
            if zlib.crc32(content) != files[name]:
                raise DamagedError(f"{where / name} is damaged: it is not what was saved")
            (Path(local) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(local) / name).write_bytes(content)
        return AutoTokenizer.from_pretrained(Path(local) / "tokenizer", local_files_only=True)


def _read_bytes(path: epath.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error}") from error


def _names(directory: epath.Path) -> str:
    return ", ".join(sorted(path.name for path in directory.iterdir()))


def _places(stored: Mapping[str, Any], sharding: Any, abstract: Any) -> dict[str, Sharding]:
    """The target of every parameter."""
    if sharding is not None and not isinstance(sharding, Sharding):
        return flatten(sharding)
    if sharding is None:
        sharding = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        own = {path: leaf.sharding for path, leaf in flatten(abstract).items()} if abstract is not None else {}
        return {path: own.get(path) or sharding for path in stored}
    return dict.fromkeys(stored, sharding)


def _cast(x: jax.Array, dtype: Any) -> jax.Array:
    if not jnp.issubdtype(x.dtype, np.floating) or x.dtype == dtype:
        return x
    return x.astype(dtype)
