"""The package leaves the process alone that imports it; the programs quieten theirs."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

from saisa_jax.cli import process

ROOT = Path(__file__).parents[2]

# What other libraries do to a process when they are imported is theirs: they come first.
IMPORT_ALL = """
import importlib, logging, os, pkgutil, signal, sys, threading

for name in sys.argv[1:]:
    importlib.import_module(name)
import jax

def state():
    loggers = {"root": logging.root, **logging.Logger.manager.loggerDict}
    loggers = {name: logger for name, logger in loggers.items() if isinstance(logger, logging.Logger)}
    return {
        **{f"logger {name}": (logger.level, *logger.filters, *logger.handlers) for name, logger in loggers.items()},
        "hooks": [sys.excepthook, sys.unraisablehook, sys.displayhook, threading.excepthook],
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "environ": dict(os.environ),
        "jax.config": dict(jax.config.values),
        "backends": bool(jax._src.xla_bridge._backends),
    }

before = state()
import saisa_jax
modules = [module.name for module in pkgutil.walk_packages(saisa_jax.__path__, "saisa_jax.")]
for name in modules:
    if name != "saisa_jax.__main__":
        importlib.import_module(name)
importlib.import_module("saisa_jax.__main__")
after = state()
assert len(modules) > 100 and "logger absl" in before and "logger asyncio" in before
for what in before:
    assert before[what] == after[what], (what, before[what], after[what])
"""
OTHERS = (
    "absl.app absl.flags absl.logging asyncio etils.epath flax grain grain.python jax jaxtyping matplotlib.pyplot "
    "ml_collections ml_collections.config_flags numpy optax orbax.checkpoint PIL.Image rich.console safetensors.numpy "
    "sentencepiece tensorstore tokenizers transformers transformers.models.clip.image_processing_pil_clip"
)


def test_nothing_happens_at_import() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *OTHERS.split()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stdout


QUIET = """
import logging, os, sys
from saisa_jax.cli.process import quiet_libraries
assert "jax" not in sys.modules
before = sys.unraisablehook
quiet_libraries()
quiet_libraries()
assert sys.unraisablehook is not before and sys.unraisablehook.args == (before,)
assert len(logging.getLogger("absl").filters) == 1
print(os.environ["TF_CPP_MIN_LOG_LEVEL"], os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"])
"""


def test_programs_are_quiet_once_and_leave_what_is_set() -> None:
    environment = {"TF_CPP_MIN_LOG_LEVEL": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", QUIET], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "1"]


def record(pathname: str, level: int) -> logging.LogRecord:
    return logging.LogRecord("absl", level, pathname, 1, "said", (), (ValueError, ValueError("x"), None))


def test_orbax_says_warnings_alone_and_without_pages() -> None:
    assert not process._quiet_orbax(record("/site-packages/orbax/checkpoint/a.py", logging.INFO))
    warning = record("/site-packages/orbax/checkpoint/a.py", logging.WARNING)
    assert process._quiet_orbax(warning) and warning.exc_info is None
    ours = record("/saisa_jax/training/loop.py", logging.INFO)
    assert process._quiet_orbax(ours) and ours.exc_info


def test_other_unraisable_errors_are_shown() -> None:
    class Unraisable:
        object = None

        def __init__(self, said: str) -> None:
            self.exc_value = RuntimeError(said)

    shown = []
    process._quiet_unraisable(shown.append, Unraisable("Event loop is closed"))
    assert not shown
    process._quiet_unraisable(shown.append, Unraisable("something else"))
    assert len(shown) == 1
