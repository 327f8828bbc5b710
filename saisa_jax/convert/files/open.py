"""From a path to an open checkpoint: which kind of files it is."""

from __future__ import annotations

from pathlib import Path

from saisa_jax.convert.files.gguf import GgufFile
from saisa_jax.convert.files.pickled import PickledDirectory
from saisa_jax.convert.files.tensors import CheckpointSource, TensorDirectory


def open_checkpoint(path: str | Path, allow_pickle: bool = False) -> CheckpointSource:
    """A GGUF file, or a checkpoint directory.

    Args:
      allow_pickle: read a directory's `.bin` files if it holds no safetensors (with `weights_only=True`).

    Raises:
      ConvertError: nothing there that can be read; says what was found.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return GgufFile(path)
    if allow_pickle and path.is_dir() and not any(path.glob("*.safetensors")):
        return PickledDirectory(path)
    return TensorDirectory(path)
