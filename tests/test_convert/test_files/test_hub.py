"""Which form of a repository's weights is taken, with a hub of local folders."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from saisa_jax.convert.files import hub
from saisa_jax.convert.rows import ConvertError

MAIN = {"config.json": "c", "tokenizer.model": "t", "pytorch_model.bin": "b", "run.py": "print()"}
CONVERTED = {**MAIN, "model.safetensors": "s"}


class FakeApi:
    """A repository whose revisions are {revision: {file: content}}."""

    def __init__(self, root: Path, revisions: dict[str, dict[str, str]], authors: dict[int, str] | None = None):
        self.root, self.revisions, self.authors = root, revisions, authors or {}

    def list_repo_tree(self, name: str, revision: str) -> list[Any]:
        assert name == "lmsys/vicuna"
        files = self.revisions[revision]
        return [SimpleNamespace(path="folder"), *(SimpleNamespace(path=f, blob_id=c) for f, c in files.items())]

    def get_repo_discussions(self, name: str, author: str, discussion_type: str, discussion_status: str) -> list[Any]:
        assert (discussion_type, discussion_status) == ("pull_request", "open")
        return [SimpleNamespace(num=n, author=who, is_pull_request=True) for n, who in self.authors.items()]

    def list_repo_refs(self, name: str) -> Any:
        refs = [SimpleNamespace(ref=ref) for ref in self.revisions if ref.startswith("refs/convert/")]
        return SimpleNamespace(converts=refs)

    def snapshot_download(self, name: str, revision: str, allow_patterns: list[str]) -> str:
        from huggingface_hub.utils import filter_repo_objects

        directory = self.root / revision
        directory.mkdir(parents=True)
        for file in filter_repo_objects(self.revisions[revision], allow_patterns=allow_patterns):
            (directory / file).write_text(self.revisions[revision][file])
        return str(directory)


@pytest.mark.parametrize(
    ("revisions", "authors", "taken", "said"),
    [
        ({"main": CONVERTED}, {}, "main/model.safetensors", "its safetensors"),
        (
            {"main": MAIN, "refs/pr/3": CONVERTED},
            {3: "SFconvertbot"},
            "refs/pr/3/model.safetensors",
            "the safetensors of refs/pr/3, a conversion of these files by SFconvertbot",
        ),
        (
            {"main": MAIN, "refs/convert/x": {"config.json": "c", "tokenizer.model": "t", "model.safetensors": ""}},
            {},
            "refs/convert/x/model.safetensors",
            "refs/convert/x",
        ),
        # Somebody else's pull request, one of files that have changed since, and one without weights are left alone.
        ({"main": MAIN, "refs/pr/3": CONVERTED}, {3: "mallory"}, "main/pytorch_model.bin", "no code of them is run"),
        (
            {"main": {**MAIN, "pytorch_model.bin": "new"}, "refs/pr/3": CONVERTED},
            {3: "SFconvertbot"},
            "main/pytorch_model.bin",
            "pytorch_model.bin, since neither it nor a conversion holds safetensors",
        ),
        ({"main": MAIN, "refs/pr/1": MAIN}, {1: "SFconvertbot"}, "main/pytorch_model.bin", "plain tensors"),
        ({"main": {"config.json": "c", "x.Q4_0.gguf": "g"}}, {}, "main/x.Q4_0.gguf", "x.Q4_0.gguf"),
    ],
)  # fmt: skip
def test_the_form_that_is_taken(
    revisions: dict[str, dict[str, str]],
    authors: dict[int, str],
    taken: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: FakeApi(tmp_path, revisions, authors))
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        where = hub.resolve("lmsys/vicuna")
    assert (tmp_path / taken).is_file() and (tmp_path / taken).parent == where
    assert "lmsys/vicuna: reading " in caplog.text and said in caplog.text
    weights = {path.name for path in where.iterdir()} - {"config.json", "tokenizer.model"}
    assert weights == {Path(taken).name}  # one form, and no code


def test_a_repository_without_weights_or_with_several_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for files, said in (
        ({"config.json": "c"}, "holds no weights"),
        ({"a.gguf": "1", "b.gguf": "2"}, r"holds 2 models in GGUF: name the file that is meant: a\.gguf, b\.gguf"),
    ):
        monkeypatch.setattr("huggingface_hub.HfApi", lambda files=files: FakeApi(tmp_path, {"main": files}))
        with pytest.raises(ConvertError, match=said):
            hub.resolve("lmsys/vicuna")


def test_where_a_source_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local path never touches the network; without one, what was fetched before serves, or a clear error."""

    class NoNetwork:
        def list_repo_tree(self, name: str, revision: str) -> list[Any]:
            raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr("huggingface_hub.HfApi", NoNetwork)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "org").mkdir()
    assert hub.resolve("~/org") == tmp_path / "org"
    for missing in ("org/name", "./a/b", "/nowhere/x", "a/b/c"):
        with pytest.raises(ConvertError, match="there is no"):
            hub.resolve(missing)
    snapshots = [
        SimpleNamespace(refs=set(refs), last_modified=1.0, snapshot_path=tmp_path / refs[0][-1], files=[
            SimpleNamespace(file_name=name) for name in names
        ])
        for refs, names in ((["main"], ["config.json"]), (["refs/pr/3"], ["config.json", "model.safetensors"]))
    ]  # fmt: skip
    held = SimpleNamespace(repo_id="other/name", repo_type="model", revisions=snapshots)
    monkeypatch.setattr("huggingface_hub.scan_cache_dir", lambda: SimpleNamespace(repos=[held]))
    assert hub.resolve("other/name") == tmp_path / "3"
    with pytest.raises(ConvertError, match=r"third/name is no local path.*couldn't connect\. Without a network"):
        hub.resolve("third/name")
