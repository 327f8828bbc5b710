"""Imports point downwards: which room of the package may read which, and no module reads itself by way of others."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "saisa_jax"

# A room reads rooms of lower layers alone, inside functions too.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "batch", "chips"}),
    frozenset({"buckets", "compilation", "config", "registry"}),
    frozenset({"checkpoints", "data", "models"}),
    frozenset({"convert", "flops", "parallel"}),
    frozenset({"presets", "testing"}),
    frozenset({"configs", "inference"}),
    frozenset({"__init__"}),  # `saisa_jax` itself: `load` on first use
    frozenset({"evaluation", "serving"}),
    frozenset({"training"}),
    frozenset({"planning", "report"}),
    frozenset({"bench"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
LAYER = {room: number for number, layer in enumerate(LAYERS) for room in layer}


def name_of(path: Path) -> str:
    """The dotted name of a file; configs/ is a room of the package when it is installed."""
    relative = path.relative_to(PACKAGE if PACKAGE in path.parents else ROOT).with_suffix("")
    return ".".join(("saisa_jax", *relative.parts)).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted([*PACKAGE.rglob("*.py"), *ROOT.glob("configs/*.py")])}


def imported(node: ast.AST) -> Iterator[str]:
    """Modules of the package that an import statement names; of `from x import y` y if it is a module, else x."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "saisa_jax")
    elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "saisa_jax":
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            yield whole if whole in MODULES else str(node.module)


def room_of(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def test_every_room_has_a_layer() -> None:
    assert {room_of(module) for module in MODULES} == set(LAYER)


@pytest.mark.parametrize("room", sorted(LAYER))
def test_arrows_go_downwards(room: str) -> None:
    for module, path in MODULES.items():
        if room_of(module) == room:
            for node in ast.walk(ast.parse(path.read_text())):
                for other in imported(node):
                    below = LAYER[room_of(other)] < LAYER[room] or room_of(other) == room
                    assert below, f"{path.relative_to(ROOT)} imports {other}, which is not below {room}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {
        module: {other for node in ast.parse(path.read_text()).body for other in imported(node) if other != module}
        for module, path in MODULES.items()
    }
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)  # else CycleError tells which
