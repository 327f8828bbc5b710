"""From a path to an open checkpoint: which kind of files it is."""

from __future__ import annotations

from pathlib import Path

from absl import logging

from saisa_jax.convert.files.gguf import GgufFile, choose_gguf
from saisa_jax.convert.files.pickled import PICKLED_INDEX, PICKLED_SINGLE, PickledDirectory
from saisa_jax.convert.files.tensors import CheckpointSource, TensorDirectory
from saisa_jax.convert.rows import ConvertError


def open_checkpoint(path: str | Path) -> CheckpointSource:
    """A GGUF file, or a directory: of safetensors, else of `.bin` files, else of a GGUF file.

    Raises:
      ConvertError: nothing there that can be read; says what was found.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() == ".gguf":
        return GgufFile(path)
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return TensorDirectory(path)
    if (path / PICKLED_INDEX).exists() or (path / PICKLED_SINGLE).exists():
        logging.warning(
            "%s holds no safetensors: its .bin files are read as plain tensors, no code of them is run", path
        )
        return PickledDirectory(path)
    ggufs = [file.name for file in path.iterdir() if file.suffix.lower() == ".gguf"]
    if ggufs:
        return GgufFile(path / choose_gguf(ggufs, str(path))[0])
    found = ", ".join(sorted(file.name for file in path.iterdir())[:12]) or "nothing"
    raise ConvertError(
        f"{path} holds neither model.safetensors nor model.safetensors.index.json, nor {PICKLED_SINGLE}, nor a GGUF "
        f"file; it holds {found}"
    )
