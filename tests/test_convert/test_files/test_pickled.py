"""`.bin` files: torch's tensors without torch, and nothing but tensors."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saisa_jax.__main__ import main
from saisa_jax.convert.files.pickled import read_pickled_header, read_pickled_tensor
from saisa_jax.convert.rows import ConvertError
from saisa_jax.testing.checkpoints import write_checkpoint

torch = pytest.importorskip("torch", reason="CPU torch is not installed")


def test_every_kind_of_tensor(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors: dict[str, Any] = {
        str(dtype): (base * 7 % 11).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    }
    tensors |= {
        "transposed": base.T, "slice": base[1:, 2:5], "same": base, "expanded": base[:1].expand(3, 6),
        "parameter": torch.nn.Parameter(base), "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 5),
        "one": base[:1, 1:2],
    }  # fmt: skip
    model = torch.nn.Linear(3, 2)  # whose state is an OrderedDict with an attribute
    for held in (tensors, model.state_dict()):
        torch.save(held, tmp_path / "x.bin")
        header = read_pickled_header(tmp_path / "x.bin")
        assert set(header) == set(held)
        for name, tensor in held.items():
            seen = read_pickled_tensor(tmp_path / "x.bin", header[name])
            plain = tensor.detach()
            half = plain.dtype == torch.bfloat16
            wanted = plain.contiguous().view(torch.int16) if half else plain
            assert header[name].shape == seen.shape == tuple(tensor.shape)
            np.testing.assert_array_equal(seen.view(np.int16) if half else seen, wanted.numpy())


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {os.environ['MARK']}",)


def test_no_code_of_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    file = tmp_path / "x.bin"
    for held, said in (
        ({"x": Evil()}, "asks for (posix|nt).system, and no code of a file is run"),
        ({"x": print}, r"asks for __builtin__\.print"),
        ({"x": torch.zeros(2).to_sparse()}, "asks for torch"),
        ({"x": "text"}, "something else than named tensors"),
        ([torch.zeros(2)], "something else than named tensors"),
    ):
        torch.save(held, file)
        with pytest.raises(ConvertError, match=said):
            read_pickled_header(file)
    assert not (tmp_path / "mark").exists()
    torch.save({"x": torch.zeros(200)}, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConvertError, match="no whole file"):
        read_pickled_header(file)
    torch.save({"x": torch.zeros(2)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(ConvertError, match=r"older one, save it again"):
        read_pickled_header(file)


def test_a_directory_of_pickles_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As vicuna-7b-v1.5 and clip-vit-large-patch14-336 come: read with a note, without torch, and back bit for bit."""
    from safetensors.torch import load_file as load_torch

    source, held = tmp_path / "theirs", {}
    write_checkpoint(source, "hf-llm")
    write_checkpoint(tmp_path / "tower", "hf-vision")
    for directory in (source, tmp_path / "tower"):
        held[directory] = load_torch(directory / "model.safetensors")
        torch.save(held[directory], directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()
    monkeypatch.setattr(torch, "load", None)
    start = tmp_path / "start"
    words = [f"--llm={source}", f"--vision={tmp_path / 'tower'}", f"--to={start}"]
    assert main(["convert", "import", *words]) == 0
    assert caplog.text.count("holds no safetensors: its .bin files are read as plain tensors") == 2
    assert main(["convert", "inspect", str(source)]) == 0
    assert "decoder" in capsys.readouterr().out
    for layout, directory in (("hf-llm", source), ("hf-vision", tmp_path / "tower")):
        assert main(["convert", "export", f"--from={start}", f"--layout={layout}", f"--to={tmp_path / layout}"]) == 0
        after = load_torch(tmp_path / layout / "model.safetensors")
        assert set(after) == set(held[directory])
        assert all(
            torch.equal(after[key], value) and after[key].dtype == value.dtype for key, value in held[directory].items()
        )
    shutil.rmtree(start)
    torch.save({"x": print}, source / "pytorch_model.bin")
    assert main(["convert", "import", f"--from={source}", f"--to={start}"]) == 2
    assert "no file of tensors alone" in capsys.readouterr().err and not start.exists()
