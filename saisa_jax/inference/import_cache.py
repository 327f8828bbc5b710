"""Where `load` finds a model: one of ours, that of a run, or somebody else's, which is imported once into a cache.

    $SAISA_JAX_CACHE/imports/NAME-KEY      the import; see `compilation.cache_root`

The key is of names, sizes and times of the source's files, so that changed files are imported anew, and nothing is read
to find that they are the same.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import jax
from absl import logging
from etils import epath

from saisa_jax.checkpoints import local_model
from saisa_jax.compilation import cache_root
from saisa_jax.config import STAGES
from saisa_jax.convert.files.hub import REPOSITORY, resolve
from saisa_jax.convert.import_checkpoint import ImportOptions, import_checkpoint
from saisa_jax.convert.rows import ConvertError

WEIGHTS = (".safetensors", ".gguf", ".bin")


def find_model(source: str | os.PathLike[str]) -> str:
    """The directory of a finished model, for whatever a user calls it.

    Args:
      source: a finished model; the workdir of a run (the model of its last finished stage); a Hugging Face directory, a
        .gguf file or a repository of the hub (org/name), which are imported on first use. `~` and `gs://` are served.

    Returns:
      the directory; where nothing is found, what was given, so that reading it says what is missing.

    Raises:
      ConvertError: foreign files that cannot be imported.
    """
    name = os.fspath(source)
    name = name if "://" in name else os.path.expanduser(name)
    where = epath.Path(name)
    if (where / "model.json").exists():
        return name
    for stage in reversed(STAGES):
        model = local_model(where, stage)
        if (model / "model.json").exists():
            logging.info("%s is a run: loading the model of its stage %s", name, stage)
            return str(model)
    if "://" in name:
        return name
    path = Path(name)
    if not path.exists() and REPOSITORY.fullmatch(name) and not Path(name.split("/")[0]).exists():
        path = resolve(name)
    elif not _is_foreign(path):
        return name
    return str(_imported(path, name))


def _is_foreign(path: Path) -> bool:
    """Whether there are somebody else's weights."""
    if path.is_file():
        return path.suffix.lower() == ".gguf"
    return path.is_dir() and any(file.suffix.lower() in WEIGHTS for file in path.iterdir())


def _imported(path: Path, name: str) -> Path:
    """The finished model that was, or now is, imported from `path`."""
    target = cache_root() / "imports" / f"{Path(name).name}-{_key(path)}"
    if (target / "model.json").exists():
        logging.info("%s was imported before, to %s", name, target)
        return target
    if jax.process_count() > 1:
        raise ConvertError(
            f"{name} is imported by one process, and there are {jax.process_count()}: python -m saisa_jax convert "
            f"import --from={name} --to=DIR, where all of them can read it, and name DIR"
        )
    logging.warning("importing %s to %s, once", name, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        import_checkpoint(ImportOptions(str(path)), target)
    except Exception:
        if not (target / "model.json").exists():  # another process may have done it meanwhile
            raise
    return target


def _key(path: Path) -> str:
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    told = []
    for file in files:
        stat = file.stat()  # of what a link leads to: the hub's cache is links
        told.append((str(file.relative_to(path)), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]
