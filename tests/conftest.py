"""What every test runs under: eight simulated CPU devices, checked annotations, and no skip without a listed reason."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from absl import flags
from jaxtyping import install_import_hook

# Read when jax starts; nothing above imports it, and the tests come after.
os.environ["JAX_PLATFORMS"] = "cpu"
DEVICES = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("NPROC", "64")  # threads of XLA's pool: with as many as cores, eight devices wait for each other
# LLVM's optimisations are half of compiling, and a test runs its programs a few times; XLA's own passes all run.
QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES} {QUICK_COMPILE}"

# Compiled programs are kept while the tests run, for all processes of this run and those that they start: many tests
# compile the same. Neither reads nor fills the user's cache.
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers get what their parent has set
    programs = tempfile.mkdtemp(prefix="saisa-jax-tests-")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

# A shell gives its background jobs an ignored Ctrl-C; the tests of being stopped want the usual one.
signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).parent
ALLOWED_SKIPS = [
    line for line in (TESTS / "allowed_skips.txt").read_text().splitlines() if line and not line.startswith("#")
]

# Checks annotations, array shapes among them, in every call; an int passes for a float, as everywhere in Python.
install_import_hook("saisa_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
flags.FLAGS.mark_as_parsed()  # Grain reads flags, and under pytest nothing parses them
logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax tells every step of a save

_unlisted_skips: list[str] = []


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """The recorded outputs of the official code, in full: SAISA_FIXTURES, or `shared/fixtures` beside the checkout."""
    directory = Path(os.environ.get("SAISA_FIXTURES", TESTS.parent.parent / "shared" / "fixtures"))
    if not directory.is_dir():
        pytest.skip(f"the full recorded fixtures are not here: {directory} does not exist; set SAISA_FIXTURES")
    return directory


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the objects of gs://bucket lie, which this process and those that it starts find while the tests run.

    One server for all tests, since gcsfs keeps the first that it has met: each test takes a folder of its own.
    """
    from saisa_jax.testing.bucket import fake_bucket

    folder = tmp_path_factory.mktemp("server")
    with fake_bucket(folder) as found, pytest.MonkeyPatch.context() as patch:
        for name, value in found.items():
            patch.setenv(name, value)
        yield folder / "bucket"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note_skip(report)


def _note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith(tuple(ALLOWED_SKIPS)):
            _unlisted_skips.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _unlisted_skips and os.environ.get("CI") == "true" and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _unlisted_skips:
        terminalreporter.section("skips whose reason is not in tests/allowed_skips.txt (an error where CI=true)")
        for line in _unlisted_skips:
            terminalreporter.write_line(line)
