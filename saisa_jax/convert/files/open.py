"""From a path to an open checkpoint: which kind of files it is."""

from __future__ import annotations

from pathlib import Path

from absl import logging

from saisa_jax.convert.files.adapted import ADAPTER_CONFIG, AdaptedSource, base_of
from saisa_jax.convert.files.gguf import GgufFile, choose_gguf
from saisa_jax.convert.files.hub import resolve
from saisa_jax.convert.files.pickled import PICKLED_INDEX, PICKLED_SINGLE, PickledDirectory
from saisa_jax.convert.files.tensors import CheckpointSource, Directory, TensorDirectory
from saisa_jax.convert.hf_json import CONFIG, read_json_if_there
from saisa_jax.convert.quantised import check_not_quantised
from saisa_jax.convert.rows import ConvertError


def open_checkpoint(path: str | Path, base: str | None = None) -> CheckpointSource:
    """A GGUF file, or a directory: of safetensors, else of `.bin` files, else of a GGUF file; or a LoRA adapter.

    Args:
      path: of the checkpoint.
      base: of an adapter; None: the one that it names.

    Raises:
      ConvertError: nothing there that can be read; says what was found. Or a quantised checkpoint.
    """
    path = Path(path).expanduser()
    if (path / ADAPTER_CONFIG).is_file():
        under = resolve(base or base_of(path))
        logging.warning("%s is an adapter: it is merged into %s", path, under)
        return AdaptedSource(path, open_checkpoint(under))
    if base:
        raise ConvertError(f"--base={base} is of an adapter, and {path} holds no {ADAPTER_CONFIG}")
    source = _open(path)
    if isinstance(source, Directory):
        check_not_quantised(source, read_json_if_there(source.where / CONFIG))
    return source


def _open(path: Path) -> CheckpointSource:
    if path.suffix.lower() == ".gguf":
        return GgufFile(path)
    if not path.is_dir() or any(file.name != "mm_projector.safetensors" for file in path.glob("*.safetensors")):
        return TensorDirectory(path)
    if (path / PICKLED_INDEX).exists() or (path / PICKLED_SINGLE).exists():
        logging.warning(
            "%s holds no safetensors: its .bin files are read as plain tensors, no code of them is run", path
        )
        return PickledDirectory(path)
    ggufs = [file.name for file in path.iterdir() if file.suffix.lower() == ".gguf"]
    if ggufs:
        return GgufFile(path / choose_gguf(ggufs, str(path))[0])
    if any(path.glob("mm_projector.*")):
        raise ConvertError(
            f"{path} holds a projector alone: name its LLM and its tower as well, to train from (stage 2): --llm=DIR "
            f"--vision=DIR --projector={path}"
        )
    found = ", ".join(sorted(file.name for file in path.iterdir())[:12]) or "nothing"
    raise ConvertError(
        f"{path} holds neither model.safetensors nor model.safetensors.index.json, nor {PICKLED_SINGLE}, nor a GGUF "
        f"file; it holds {found}"
    )


def open_projector(path: Path) -> CheckpointSource:
    """A projector alone, LLaVA's `mm_projector.bin` or one in safetensors: the file, or its directory.

    Raises:
      ConvertError: none is there.
    """
    names = [f"mm_projector.{kind}" for kind in ("safetensors", "bin")]
    file = path if path.is_file() else next((path / name for name in names if (path / name).is_file()), None)
    if file is None or file.suffix not in (".safetensors", ".bin"):
        raise ConvertError(f"{path} is no projector: neither {' nor '.join(names)}, nor a directory that holds one")
    kind = TensorDirectory if file.suffix == ".safetensors" else PickledDirectory
    return kind(file.parent, file.name)
