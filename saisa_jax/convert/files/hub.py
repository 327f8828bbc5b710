"""From what a user names, a directory, a GGUF file or a repository of the Hugging Face hub, to a local path.

Of a repository one form of its weights is fetched, and said aloud, the first that there is:

    1. its safetensors
    2. safetensors of a conversion of the same files: the branch of the pull request that the hub's own converter has
       opened, or one under refs/convert
    3. its .bin files, which are read as plain tensors (`pickled.py`)
    4. its GGUF file
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from absl import logging

from saisa_jax.convert.files.gguf import choose_gguf
from saisa_jax.convert.rows import ConvertError

BESIDE = ("*.json", "tokenizer.model", "*.txt", "*.jinja", "LICENSE*")  # no code
SAFETENSORS = ("*.safetensors",)
PICKLES = ("pytorch_model*.bin", "adapter_model.bin", "non_lora_trainables.bin", "mm_projector.bin")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CONVERTER = "SFconvertbot"  # the hub's own; pull requests of anybody else are never read


def repository(source: str) -> str:
    """The repository `org/name` of the hub that a source names; "": it is something on this machine."""
    return "" if Path(source).exists() or not REPOSITORY.fullmatch(source) else source


def resolve(source: str | os.PathLike[str]) -> Path:
    """Where a source lies on this machine; a repository `org/name` is fetched, or found in the hub's cache.

    What exists here is never looked for elsewhere, and neither is a path below a directory that exists here.

    Raises:
      ConvertError: nothing there, or it cannot be fetched.
    """
    source = os.fspath(source)
    path = Path(os.path.expanduser(source))
    if path.exists():
        return path
    if not repository(source) or Path(source.split("/")[0]).exists():
        raise ConvertError(
            f"there is no {source}; name a directory, a .gguf file, or a repository of the hub (org/name)"
        )
    return _fetch(source)


def check_push(name: str) -> None:
    """Checks that a repository of that name can be pushed to, before anything is made for it.

    Raises:
      ConvertError: the name is none, nobody is logged in, or the hub is not reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    if not REPOSITORY.fullmatch(name):
        raise ConvertError(f"--push={name} is no repository of the hub: name it ORG/NAME")
    try:
        huggingface_hub.HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise ConvertError(f"--push={name}: log in first, with `hf auth login` or HF_TOKEN") from error
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        raise _not_pushed(name, error) from error


def push(directory: Path, name: str, *, public: bool = False) -> str:
    """Uploads a directory as the repository `name`, which is made if it is not there; its address.

    Args:
      public: whether everybody may see a repository that is made.

    Raises:
      ConvertError: the upload failed; the directory stays, and a second try sends what is missing.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    api = huggingface_hub.HfApi()
    try:
        address = str(api.create_repo(name, private=not public, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=directory, commit_message="Export of saisa_jax")
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        raise _not_pushed(name, error) from error
    return address


def _not_pushed(name: str, error: Exception) -> ConvertError:
    return ConvertError(f"--push={name}: the hub does not take it: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    """Of what an error says; those of the hub go on at length."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _fetch(name: str) -> Path:
    import huggingface_hub  # slow to import
    from huggingface_hub.errors import HfHubHTTPError

    api = huggingface_hub.HfApi()
    try:
        files = _files(api, name, "main")
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        if cached := _cached(name):
            return cached
        raise ConvertError(
            f"{name} is no local path, and the hub does not give a repository of that name: {_first_line(error)}. "
            "Without a network, bring the directory here and name its path"
        ) from error
    try:
        revision, patterns, said = _choose(api, name, files)
        logging.warning("%s: reading %s", name, said)
        where = Path(api.snapshot_download(name, revision=revision, allow_patterns=[*BESIDE, *patterns]))
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, ConvertError):
            raise
        raise ConvertError(f"{name} could not be fetched: {_first_line(error)}") from error
    return where


def _choose(api: Any, name: str, files: dict[str, str]) -> tuple[str, tuple[str, ...], str]:
    """(revision, patterns, words for the user) of the form of the weights that is taken."""
    if _match(files, SAFETENSORS):
        return "main", SAFETENSORS, "its safetensors"
    pickles = _match(files, PICKLES)
    if pickles:
        for revision, by in _conversions(api, name):
            there = _files(api, name, revision)
            # Only a conversion of what the repository holds now; a convert branch may leave the pickles out.
            same = all(
                there.get(file, content if file in pickles else None) == content for file, content in files.items()
            )
            if same and _match(there, SAFETENSORS):
                return revision, SAFETENSORS, f"the safetensors of {revision}, a conversion of these files by {by}"
        note = "read as plain tensors: no code of them is run"
        return "main", PICKLES, f"{', '.join(pickles)}, since neither it nor a conversion holds safetensors ({note})"
    ggufs = [file for file in files if "/" not in file and file.lower().endswith(".gguf")]
    if ggufs:
        chosen = choose_gguf(ggufs, name)
        return "main", tuple(chosen), ", ".join(chosen)
    raise ConvertError(f"{name} holds no weights: neither safetensors nor pytorch_model.bin nor a GGUF file")


def _match(files: dict[str, str], patterns: tuple[str, ...]) -> list[str]:
    """Files of the repository's own folder."""
    return sorted(file for file in files if "/" not in file and any(fnmatch(file, pattern) for pattern in patterns))


def _files(api: Any, name: str, revision: str) -> dict[str, str]:
    """The files that would be read, and a hash of the content of each."""
    entries = api.list_repo_tree(name, revision=revision)
    files = {entry.path: entry.blob_id for entry in entries if hasattr(entry, "blob_id")}
    wanted = (*BESIDE, *SAFETENSORS, *PICKLES, "*.gguf", "*.GGUF")
    return {file: content for file, content in files.items() if any(fnmatch(file, pattern) for pattern in wanted)}


def _conversions(api: Any, name: str) -> Iterator[tuple[str, str]]:
    """Revisions that the hub's own programs have made of a repository, and who."""
    found = api.get_repo_discussions(name, author=CONVERTER, discussion_type="pull_request", discussion_status="open")
    for request in found:
        if request.author == CONVERTER and request.is_pull_request:
            yield f"refs/pr/{request.num}", CONVERTER
    for ref in api.list_repo_refs(name).converts:
        yield ref.ref, "the hub"


def _cached(name: str) -> Path | None:
    """A snapshot of the repository that was fetched before, with weights in it; main's first."""
    import huggingface_hub
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = huggingface_hub.scan_cache_dir().repos
    except CacheNotFound:
        return None
    weights = (*SAFETENSORS, *PICKLES, "*.gguf", "*.GGUF")
    found = [
        ("main" not in revision.refs, -revision.last_modified, revision.snapshot_path)
        for repository in repositories
        if repository.repo_id == name and repository.repo_type == "model"
        for revision in repository.revisions
        if _match({file.file_name: "" for file in revision.files}, weights)
    ]
    if not found:
        return None
    where = min(found)[2]
    logging.warning("%s: the hub is not reached; reading what was fetched before, %s", name, where)
    return where
