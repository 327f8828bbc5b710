"""`bench growth`: exponents are of what the picture adds, and every alignment reads the same rows."""

from __future__ import annotations

import json

import pytest

from saisa_jax import __main__ as main
from saisa_jax.bench import growth, times
from saisa_jax.bench.tables import png
from saisa_jax.bench.times import Timed, Watch
from saisa_jax.cli import bench_growth
from saisa_jax.config import ConfigError


def point(images: int, tokens: int) -> growth.Point:
    visual = images * tokens
    saisa, llava = 0.5 + 0.001 * visual, 0.5 + 1e-6 * visual**2
    timed = {"saisa": Timed(0, [saisa], [saisa]), "llava": Timed(0, [llava], [llava])}
    return growth.Point(images, tokens, timed, {"saisa": 1e6 + visual, "llava": 1e6 + visual**1.5}, Watch().stop())


POINTS = [point(0, 64), point(1, 64), point(1, 256), point(4, 256)]


def test_exponents() -> None:
    assert growth.exponent(POINTS, "saisa", "time") == pytest.approx(1)
    assert growth.exponent(POINTS, "llava", "time") == pytest.approx(2)
    assert growth.exponent(POINTS, "llava", "memory") == pytest.approx(1.5)
    assert growth.exponent(POINTS[:2], "saisa", "time") != growth.exponent(POINTS[:2], "saisa", "time")  # no line: NaN
    lines = growth.grid(POINTS).markdown().splitlines()
    assert lines[4].startswith("| text alone | 500 | 500 |")
    assert lines[-1] == "| exponent |  |  | 1.00 | 2.00 | 1.00 | 1.50 |"
    assert png(lambda: growth.figure(POINTS, True)).startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_command(tmp_path, capsys, monkeypatch) -> None:
    measure = times.measure_machine
    monkeypatch.setattr(bench_growth, "measure_machine", lambda dtype: measure(dtype, repeat=1, size=64))
    assert main.main(["bench", "growth", "--size=tiny", "--tokens=4,16", "--images=2", "--repeat=1",
                      f"--output={tmp_path}"]) == 0  # fmt: skip
    assert "exponent" in capsys.readouterr().out
    record = json.loads((tmp_path / "growth.json").read_text())
    assert [(one["images"], one["tokens"]) for one in record] == [(0, 16), (1, 4), (1, 16), (2, 16)]
    assert all(of["memory"] > 0 for one in record for of in one["alignments"].values())


@pytest.mark.parametrize("option", ["--tokens=5", "--images=0", "--repeat=0", "--alignments=other"])
def test_flags(option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        bench_growth.main([option])
