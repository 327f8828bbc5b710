"""Names of slices, and what is said about wrong ones."""

from __future__ import annotations

import importlib.util

import pytest

from saisa_jax.chips import CHIPS
from saisa_jax.config import ConfigError
from saisa_jax.planning import topologies
from saisa_jax.planning.topologies import Topology, parse


@pytest.mark.parametrize(
    ("name", "kind", "shape", "slices", "chips"),
    [
        ("v5e:4x4", "v5e", (4, 4), 1, 16),
        ("v5e:4x4*2", "v5e", (4, 4), 2, 32),
        ("v5p:2x2x4", "v5p", (2, 2, 4), 1, 16),
        ("h100:8", "h100", (8,), 1, 8),
    ],
)
def test_names(name: str, kind: str, shape: tuple[int, ...], slices: int, chips: int) -> None:
    topology = parse(name)
    assert topology == Topology(name, kind, shape, slices) and topology.chips == chips
    assert topology.on_gpu == (kind == "h100")


def test_every_example_is_legal() -> None:
    assert all(parse(f"{kind}:{chip.example}").chips > 1 for kind, chip in CHIPS.items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5:4x4", r"no known chip; did you mean v5[ep] or v5[ep]"),
        ("v5e-16", r"no known chip; did you mean v5e"),
        ("v5e:16", r"v5e takes a shape of 2 sides, for example v5e:4x4"),
        ("v5p:4x4", r"v5p takes a shape of 3 sides, for example v5p:2x2x4"),
        ("h100:2x4", r"h100 takes a number of GPUs, for example h100:8"),
        ("v5e:0x4", r"shape of 2 sides"),
        ("v5e:4x4*0", r"\*0 is no number of slices; for example v5e:4x4\*2"),
        ("v5e:4x4*", r"\* is no number of slices"),
        ("h100:8*2", r"h100 is planned in one node; for example h100:8"),
        ("zzz", r"known chips: v4, v5e"),
    ],
)
def test_wrong_names_are_answered_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(name)


@pytest.mark.parametrize(("name", "package"), [("v5e:4x4", "-r requirements-tpu.txt"), ("h100:8", r"'jax\[cuda13\]'")])
def test_a_missing_compiler_says_how_to_install_it(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"--topology={name} needs .*: pip install {package}"):
        topologies.devices(parse(name))


@pytest.mark.aot
@pytest.mark.parametrize(
    "name", ["v5e:1x1", "v5e:4x4*2", "v5p:1x1x1", *(f"{k}:{c.example}" for k, c in CHIPS.items() if c.axes > 1)]
)
def test_devices_of_slices(name: str) -> None:
    topology = parse(name)
    assert len(topologies.devices(topology)) == topology.chips * topology.chip.devices
