"""Where copies lie that are read instead of a file in a bucket, or a packed one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/saisa_jax`, or `~/.cache/saisa_jax`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saisa_jax"


def write_copy(source: Any, target: Path) -> None:
    """Copies an open file to a file that is not there before it is whole; other processes may do the same."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            shutil.copyfileobj(source, file, 2**24)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
