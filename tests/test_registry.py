"""What is chosen by name: found in its folder, registered by a program of one's own, or brought by an installed one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from saisa_jax.errors import UserError
from saisa_jax.registry import ExtensionError, Registry, UnknownNameError


@pytest.fixture
def animals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[str]:
    """A package with a registry and one module that registers itself, and a helper that does not."""
    package = tmp_path / "zoo"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from saisa_jax.registry import Registry\nANIMALS = Registry('zoo.animal', __name__)\n"
    )
    (package / "cat.py").write_text("from zoo import ANIMALS\nANIMALS.register('cat')('meow')\n")
    (package / "common.py").write_text("SOUND = 'moo'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield __import__("zoo").ANIMALS
    for name in [name for name in sys.modules if name.split(".")[0] == "zoo"]:
        del sys.modules[name]


def test_a_file_in_the_folder_is_found(animals: Registry[str], tmp_path: Path) -> None:
    (tmp_path / "zoo" / "dog.py").write_text("from zoo import ANIMALS\nANIMALS.register('dog')('woof')\n")
    assert animals["dog"] == "woof" and dict(animals) == {"cat": "meow", "dog": "woof"}
    assert "cat" in animals and "common" not in animals and len(animals) == 2


def test_a_program_registers_its_own(animals: Registry[str]) -> None:
    animals.register("cow")("moo")
    assert animals["cow"] == "moo" and sorted(animals) == ["cat", "cow"]
    with pytest.raises(ValueError, match=r"zoo.animal='cat' is registered twice: 'meow' and 'purr'"):
        animals.register("cat")("purr")


def test_an_unknown_name_is_answered_with_the_nearest(animals: Registry[str]) -> None:
    with pytest.raises(UnknownNameError, match=r"zoo.animal='kat' is not one of cat; did you mean cat\?"):
        animals["kat"]
    assert issubclass(UnknownNameError, UserError)


def install(tmp_path: Path, entry: str) -> None:
    metadata = tmp_path / "horses-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: horses\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[zoo]\n{entry}\n")


def test_an_installed_extension_is_found(animals: Registry[str], tmp_path: Path) -> None:
    (tmp_path / "horses.py").write_text("from zoo import ANIMALS\nANIMALS.register('horse')('neigh')\n")
    install(tmp_path, "horse = horses")
    assert animals["horse"] == "neigh"
    sys.modules.pop("horses")


def test_an_extension_that_cannot_be_imported_is_named_each_time(animals: Registry[str], tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import saddle\n")
    install(tmp_path, "horse = broken")
    for _ in range(2):
        with pytest.raises(ExtensionError, match=r"horses brings horse = broken to zoo, .*No module named 'saddle'"):
            animals["horse"]
    (tmp_path / "broken.py").write_text("from zoo import ANIMALS\nANIMALS.register('horse')('neigh')\n")
    assert animals["horse"] == "neigh"
    sys.modules.pop("broken")


def test_a_file_that_cannot_be_imported_is_an_error_each_time(animals: Registry[str], tmp_path: Path) -> None:
    (tmp_path / "zoo" / "dog.py").write_text("import kennel\n")
    for _ in range(2):
        with pytest.raises(ImportError, match="kennel"):
            animals["fox"]
