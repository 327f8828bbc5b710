"""From what a user names, a directory, a GGUF file or a repository of the Hugging Face hub, to a local path."""

from __future__ import annotations

import re
from pathlib import Path

from saisa_jax.convert.rows import ConvertError

# No code, and no pickles unless they are asked for.
PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model", "*.txt", "*.jinja")
PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def repository(source: str) -> str:
    """The repository `org/name` of the hub that a source names; "": it is something on this machine."""
    return "" if Path(source).exists() or not REPOSITORY.fullmatch(source) else source


def resolve(source: str, allow_pickle: bool = False) -> Path:
    """Where a source lies on this machine; a repository `org/name` is fetched, or found in the hub's cache.

    What exists here is never looked for elsewhere, and neither is a path below a directory that exists here.

    Raises:
      ConvertError: nothing there, or it cannot be fetched.
    """
    path = Path(source)
    if path.exists():
        return path
    if not repository(source) or Path(source.split("/")[0]).exists():
        raise ConvertError(
            f"there is no {source}; name a directory, a .gguf file, or a repository of the hub (org/name)"
        )
    import huggingface_hub  # slow to import
    from huggingface_hub.errors import HfHubHTTPError

    patterns = [*PATTERNS, *(PICKLES if allow_pickle else ())]
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConvertError(
            f"{source} is no local path, and the hub does not give a repository of that name: {reason}. Without a "
            "network, bring the directory here and name its path"
        ) from error
