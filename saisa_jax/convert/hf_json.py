"""The small JSON files of a checkpoint directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from saisa_jax.convert.rows import ConvertError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
PREPROCESSOR_CONFIG = "preprocessor_config.json"
PROCESSOR_CONFIG = "processor_config.json"  # of a multimodal processor; since transformers 5 with all of its parts


def read_json(path: Path | epath.Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      ConvertError: no such file, or no JSON object in it.
    """
    if not path.is_file():
        raise ConvertError(f"{path} is not there")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ConvertError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConvertError(f"{path} holds no JSON object")
    return value


def read_json_if_there(path: Path | epath.Path) -> dict[str, Any]:
    """The same; {}: there is no such file."""
    return read_json(path) if path.is_file() else {}


def read_preprocessor(directory: Path) -> dict[str, Any]:
    """How a directory's pictures become pixels; {}: it does not say."""
    nested = read_json_if_there(directory / PROCESSOR_CONFIG).get("image_processor")
    return read_json_if_there(directory / PREPROCESSOR_CONFIG) or dict(nested or {})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object."""
    path.write_text(json.dumps(content, indent=2) + "\n")
