"""`bench peers`: the same outputs before times, what a measure needs, and what is said of a busy machine."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from saisa_jax import __main__ as main
from saisa_jax.bench import peers, peers_report, times
from saisa_jax.bench.sizes import SIZES, make_config, rows_of
from saisa_jax.bench.times import Machine, Timed, Watch
from saisa_jax.cli import bench_peers
from saisa_jax.config import ConfigError

torch = pytest.importorskip("torch", reason="CPU torch is not installed")

MACHINE = Machine(100e9, 10e9, 0.99)


@pytest.fixture
def quick(monkeypatch) -> None:
    """Peaks of small arrays, and one thread of torch: several wait long for each other where there is other load."""
    measure = times.measure_machine
    monkeypatch.setattr("saisa_jax.bench.in_torch.programs.cores", lambda: 1)
    monkeypatch.setattr(bench_peers, "measure_machine", lambda *args: measure(*args, repeat=1, size=64))


def found(**seconds: tuple[float, float]) -> peers.Found:
    """Of prefill at the size of the bars: {program: (wall, processor)} of every round."""
    names = {"ours": "this program", "eager": "PyTorch", "authors": "the authors' way"}
    timed = {}
    for key, (wall, processor) in seconds.items():
        alignment, name = key.split("_")
        timed[f"{alignment}, {names[name]}"] = Timed(
            47e9 if alignment == "saisa" else 130e9, [wall] * 3, [processor] * 3
        )
    watch = Watch().stop()
    watch.others = 0.0
    return peers.Found(peers_report.AT, "prefill", timed, dict.fromkeys(timed, 0.0), watch)


def test_bars() -> None:
    one = found(saisa_ours=(0.3, 0.6), saisa_eager=(0.6, 0.9), saisa_authors=(0.5, 1.5), llava_ours=(0.9, 1.8))
    bars = {bar.what: bar for bar in peers_report.bars([one], MACHINE)}
    assert len(bars) == 5
    authors = bars["SAISA's prefill of the authors' way"]
    assert authors.found == pytest.approx((0.6, 0.4)) and not authors.met("wall") and authors.met("processor")
    of_llava = next(bar for what, bar in bars.items() if "of LLaVA's" in what)
    assert of_llava.limit == pytest.approx(1.05 * 47 / 130) and of_llava.met("wall")
    peak = bars["SAISA's prefill, of the matmul peak"]
    assert peak.least and peak.found.wall == pytest.approx(47 / 0.3 / 100) and peak.met("wall")
    table = peers_report.grid(one, MACHINE).markdown()
    assert "| SAISA, this program | 300.0 | 0% | 600.0 | 0.50 / 0.67 | 0.33 / 0.33 | 157% |" in table


def test_what_a_measure_needs() -> None:
    config = make_config(SIZES["mid"], "saisa", 2, "float32")
    prefill, second = (peers.needed(config, measure) for measure in ("prefill", "second"))
    projectors = 2 * 12 * 576 * 2 * (1024 * 768 + 768 * 768)  # rows, layers, tokens
    keys_values = 2 * 12 * 576 * 2 * 2 * 768 * 768
    assert prefill - second == pytest.approx(projectors + keys_values)
    token = peers.needed(config, "decode") / 2
    assert token == pytest.approx(2 * (12 * (4 * 768 * 768 + 3 * 768 * 2048) + 768 * 32000) + 4 * 640 * 768 * 12)


def test_other_outputs_are_not_timed() -> None:
    def program(name: str, value: float) -> peers.Program:
        return peers.Program(name, "saisa", {}, {"prefill": lambda: np.array([1.0, value])})

    taking = {name: program(name, value) for name, value in (("ours", 4.0), ("near", 4.001))}
    assert peers.compare(taking, peers_report.AT, "prefill")["near"] == pytest.approx(0.00025, rel=1e-3)
    with pytest.raises(peers.DisagreeError, match="prefill of far differs"):
        peers.compare(taking | {"far": program("far", 5.0)}, peers_report.AT, "prefill")
    with pytest.raises(peers.DisagreeError):
        peers.compare(taking | {"nan": program("nan", float("nan"))}, peers_report.AT, "prefill")


def test_rows() -> None:
    size = SIZES["tiny"]
    model = make_config(size, "llava", 3, "float32").model_for("finetune")
    batch = rows_of(size, model, 3)
    assert batch["tokens"].shape == (3, 12) and (batch["image_positions"] == 4).all()
    assert batch["positions"][0].tolist() == [0, 1, 2, 3, *range(20, 28)]


@pytest.mark.usefixtures("quick")
def test_the_command(tmp_path, capsys) -> None:
    """The peers' outputs are those of this program, or it would fail; training's is in a slow test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(times, "MOST_BY_OTHERS", -1.0)  # busy, whatever this machine does
        assert main.main(["bench", "peers", "--sizes=tiny", "--rows=2", "--repeat=2", "--runtimes=eager",
                          "--measures=prefill,second,decode", f"--output={tmp_path}"]) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "Nothing is concluded: " in out and "(busy)" in out and "The bars" not in out
    record = json.loads((tmp_path / "peers.json").read_text())
    assert [one["measure"] for one in record["found"]] == ["prefill", "second", "decode"]
    programs = {one["measure"]: one["programs"] for one in record["found"]}
    assert set(programs["prefill"]) == {
        "saisa, this program", "saisa, PyTorch", "saisa, the authors' way", "llava, this program", "llava, PyTorch"
    }  # fmt: skip
    assert set(programs["second"]) == {"saisa, this program", "saisa, PyTorch"}
    assert all(one["difference"] < 1e-4 for of in programs.values() for one in of.values())
    assert all(len(one["seconds"]) == len(one["processor"]) == 2 for of in programs.values() for one in of.values())
    assert (tmp_path / "peers.md").read_text().count("| SAISA, this program |") == 3
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_compiled_and_in_bfloat16(capsys) -> None:
    assert main.main(["bench", "peers", "--sizes=tiny", "--rows=8", "--dtypes=bfloat16", "--repeat=1"]) == 0
    out = capsys.readouterr().out
    assert "SAISA, torch.compile" in out or "torch.compile does not work here" in out


@pytest.mark.parametrize(
    "option", ["--sizes=huge", "--rows=0", "--rows=a", "--dtypes=int8", "--measures=x", "--runtimes=jit", "--repeat=0"]
)
def test_flags(option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        bench_peers.main([option])


def test_without_torch(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "saisa_jax.bench.in_torch.programs", raising=False)
    monkeypatch.delitem(sys.modules, "saisa_jax.bench.in_torch.peer", raising=False)
    with pytest.raises(ConfigError, match="pip install torch"):
        peers.peers()
