"""What front and connector agree upon, and the folder between them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "integrations" / "vllm"
KEYS = [f"{n:032x}" for n in range(1, 6)]


@pytest.fixture(autouse=True)
def package(monkeypatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "saisa_jax_vllm"]:
        del sys.modules[name]


def runs_module() -> Any:
    return importlib.import_module("saisa_jax_vllm.runs")


def new_store(folder: Path, most: int = 100) -> Any:
    return importlib.import_module("saisa_jax_vllm.store").Store(folder, most)


def test_what_is_to_be_loaded_after_places_that_are_there():
    runs = runs_module()
    some = [runs.Run(KEYS[0], 5), runs.Run(KEYS[1], 40), runs.Run(KEYS[2], 3)]
    assert runs.from_params(runs.to_params(some)) == tuple(some) and runs.length(some) == 48
    part = runs.Part
    assert list(runs.parts_from(some, 0)) == [part(KEYS[0], 0, 5, 0), part(KEYS[1], 0, 40, 5), part(KEYS[2], 0, 3, 45)]
    assert list(runs.parts_from(some, 32)) == [part(KEYS[1], 27, 40, 32), part(KEYS[2], 0, 3, 45)]
    assert list(runs.parts_from(some, 45)) == [part(KEYS[2], 0, 3, 45)] and not list(runs.parts_from(some, 48))


def test_places_of_a_sequence_in_blocks():
    runs = runs_module()
    assert runs.slots([7, 2, 9], 4, 2, 8) == [30, 31, 8, 9, 10, 11, 36, 37]
    with pytest.raises(IndexError):
        runs.slots([7], 4, 3, 2)


def test_heads_of_each_process():
    of = runs_module().kv_heads_of
    assert [list(of(rank, 2, 8)) for rank in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [list(of(rank, 4, 2)) for rank in range(4)] == [[0], [0], [1], [1]]  # fewer heads than processes
    assert list(of(0, 1, 3)) == [0, 1, 2]


@pytest.mark.parametrize(
    "wrong", [[], {"runs": 3}, {"runs": [["../../etc/passwd", 4]]}, {"runs": [[KEYS[0], 0]]}, {"runs": [[KEYS[0]]]}]
)
def test_parameters_that_are_none(wrong):
    runs = runs_module()
    with pytest.raises(runs.RunsError, match=r"kv_transfer_params\.saisa"):
        runs.from_params({"saisa": wrong})
    assert runs.from_params(None) == runs.from_params({"other": 1}) == ()


def test_a_store_keeps_what_was_used_last_and_what_is_held(tmp_path):
    store = new_store(tmp_path)
    for key in KEYS[:3]:
        store.put(key, lambda path: path.write_bytes(b"x" * 40))
    assert [store.has(key) for key in KEYS[:3]] == [False, True, True] and store.nbytes == 80
    assert store.has(KEYS[1])  # used later than the other
    with store.holding(KEYS[1:3]), store.holding(KEYS[2:3]):
        for key in KEYS[3:]:
            store.put(key, lambda path: path.write_bytes(b"x" * 40))
        assert store.has(KEYS[1]) and store.has(KEYS[2]) and not store.has(KEYS[3])
    assert store.nbytes <= 100 and store.written == 5 and len(list(tmp_path.glob("*.safetensors"))) == len(store) == 2


def test_a_file_is_whole_or_not_there(tmp_path):
    store = new_store(tmp_path)

    def half(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        store.put(KEYS[0], half)
    assert not store.has(KEYS[0]) and sorted(file.name for file in tmp_path.iterdir()) == ["owner"]
    store.put(KEYS[0], lambda path: path.write_bytes(b"whole"))
    (tmp_path / f"{KEYS[0]}.safetensors").unlink()
    assert not store.has(KEYS[0]) and store.nbytes == 0


def test_a_store_is_of_one_front_and_outlives_it(tmp_path):
    store = new_store(tmp_path)
    store.put(KEYS[0], lambda path: path.write_bytes(b"x" * 40))
    (tmp_path / f"{KEYS[1]}.half").write_bytes(b"of one that was killed")
    (tmp_path / "notes.safetensors").write_bytes(b"somebody else's")
    with pytest.raises(ValueError, match="is that of another front, which is running: name another folder"):
        new_store(tmp_path)
    store.close()
    again = new_store(tmp_path)
    assert again.has(KEYS[0]) and again.nbytes == 40 and not (tmp_path / f"{KEYS[1]}.half").exists()
    again.close()
    smaller = new_store(tmp_path, 10)
    assert not smaller.has(KEYS[0]) and (tmp_path / "notes.safetensors").exists()
