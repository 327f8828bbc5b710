"""`bench parts`: FLOPs and weights of each part, and its operations in a trace."""

from __future__ import annotations

import json

import jax
import pytest

from saisa_jax import __main__ as main
from saisa_jax import flops
from saisa_jax.bench import parts, times
from saisa_jax.bench.sizes import SIZES, make_config
from saisa_jax.bench.times import Machine
from saisa_jax.cli import bench_parts
from saisa_jax.config import ConfigError
from saisa_jax.models.saisa import init_params


def test_floor() -> None:
    machine = Machine(100e9, 10e9, 0.99)
    assert parts.Part(200e9, 10e9, 4.0).floor(machine) == 2  # arithmetic
    assert parts.Part(200e9, 50e9, 8.0).floor(machine) == 5  # memory


def test_bytes_of_weights() -> None:
    model = make_config(SIZES["tiny"], "saisa", 1, "float32").model_for("finetune")
    found = parts.weight_bytes(init_params(model, jax.random.key(0)), "bfloat16")
    assert found["mlp"] == 2 * 2 * 3 * 64 * 96 and found["q"] == 2 * 2 * 64 * 64 and found["kv"] == 2 * 2 * 2 * 64 * 32
    assert found["projectors"] == 2 * 2 * ((32 + 1) * 64 + (64 + 1) * 64) and found["head"] == 2 * 64 * 256


def test_the_command(tmp_path, capsys, monkeypatch) -> None:
    measure = times.measure_machine
    monkeypatch.setattr(bench_parts, "measure_machine", lambda dtype: measure(dtype, repeat=1, size=64))
    assert main.main(["bench", "parts", "--size=tiny", "--programs=prefill", "--alignments=saisa", "--repeat=1",
                      f"--output={tmp_path}"]) == 0  # fmt: skip
    assert "between operations" in capsys.readouterr().out
    (record,) = json.loads((tmp_path / "parts.json").read_text())
    model = make_config(SIZES["tiny"], "saisa", 1, "float32").model_for("finetune")
    needed = flops.prefill(model, 12, 1).parts
    for part in ("projectors", "q", "kv", "o", "attention", "mlp", "head"):
        assert record["parts"][part]["flops"] == needed[part]
    assert record["parts"]["projectors"]["seconds"] > 0  # the trace names its operations


@pytest.mark.parametrize("option", ["--rows=0", "--programs=x", "--alignments=other"])
def test_flags(option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        bench_parts.main([option])
