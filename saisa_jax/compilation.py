"""Compiled programs: kept on the disk from one process to the next, and told of while they are made.

    $JAX_COMPILATION_CACHE_DIR, or CACHES/xla/MACHINE     what JAX keeps; it may be deleted at any time

MACHINE are the instructions of the processor, since a program that was compiled for a CPU may use any of them.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

COMPILING = "/jax/core/compile/backend_compile_duration"  # one program, looked up in the cache or compiled
FOUND = "/jax/compilation_cache/cache_hits"
SAVED = "/jax/compilation_cache/compile_time_saved_sec"
OFF = "off"


def cache_root() -> Path:
    """Where caches of this user lie: `$SAISA_JAX_CACHE`, or saisa_jax in `$XDG_CACHE_HOME` or `~/.cache`."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SAISA_JAX_CACHE") or Path(caches) / "saisa_jax")


def default_directory() -> Path:
    """Where compiled programs are kept unless something else is said."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        instructions = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):  # not Linux
        instructions = platform.processor()
    machine = f"{platform.machine() or 'machine'}-{zlib.crc32(instructions.encode()):08x}"
    return cache_root() / "xla" / machine


def keep_programs(choice: str = "") -> None:
    """Has this process keep compiled programs on the disk and look for them there. Call it before jax is imported.

    A directory that cannot be written is told of on stderr, and nothing is kept.

    Args:
      choice: a directory or bucket; "off"; "": what JAX's own variables say (`JAX_ENABLE_COMPILATION_CACHE`,
        `JAX_COMPILATION_CACHE_DIR`), or else the default directory.
    """
    if choice == OFF:
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        return
    if choice:
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
    elif os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "true").lower() in ("false", "0", "no", "off"):
        return
    directory = choice or os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(default_directory())
    if "://" not in directory:
        directory = os.path.expanduser(directory)
        try:
            Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)  # what lies there is run
            tempfile.TemporaryFile(dir=directory).close()
        except OSError as error:
            print(
                f"compiled programs are not kept: {directory} cannot be written ({error.strerror}); name another place "
                f"with --compilation_cache=DIR, or --compilation_cache={OFF}",
                file=sys.stderr,
            )
            os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
            return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = directory


def share_programs() -> None:
    """Several processes keep none unless a place was named; on CPUs, where they would wait for each other, none at all.

    What one process finds and another has to compile sets them apart. To be called when they have met, before anything
    is compiled.
    """
    import jax

    named = jax.config.values["jax_compilation_cache_dir"] not in (None, str(default_directory()))
    if not named or jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)


class Programs:
    """Counts the programs that this process compiles from now on, and tells of those that take their time.

    Args:
      say: takes a line when a program has been compiling for `after` seconds, one when it is there, and one when the
        cache has saved so much; None: nothing is said.
      after: seconds.

    Attributes:
      compiled: programs.
      found: programs that came from the cache.
      seconds: that both took.
    """

    def __init__(self, say: Callable[[str], None] | None = None, after: float = 1.0) -> None:
        import jax

        self.compiled, self.found, self.seconds = 0, 0, 0.0
        self._say, self._after = say, after
        self._now = threading.local()  # of the program that the thread is compiling
        jax.monitoring.register_scalar_listener(self._begin)
        jax.monitoring.register_event_listener(self._hit)
        jax.monitoring.register_event_duration_secs_listener(self._end)

    def _begin(self, event: str, value: float | int, **said: str | int) -> None:
        if event != COMPILING:
            return
        self._now.found, self._now.saved, self._now.told = False, 0.0, threading.Event()
        if self._say:
            name = name_of(said)
            self._now.timer = threading.Timer(self._after, self._tell, (name, self._now.told))
            self._now.timer.daemon = True
            self._now.timer.start()

    def _tell(self, name: str, told: threading.Event) -> None:
        told.set()
        if self._say:
            self._say(f"compiling {name} ...")

    def _hit(self, event: str, **said: str | int) -> None:
        if event == FOUND:
            self._now.found = True

    def _end(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == SAVED:
            self._now.saved = duration_secs
        if event != COMPILING or not hasattr(self._now, "told"):
            return
        self.seconds += duration_secs
        self.found += self._now.found
        self.compiled += not self._now.found
        if not self._say:
            return
        self._now.timer.cancel()
        if self._now.found and (self._now.told.is_set() or self._now.saved >= self._after):
            saved = max(self._now.saved, 0.0)
            self._say(f"{name_of(kwargs)} came from the compilation cache, which saved {saved:.1f} s")
        elif self._now.told.is_set():
            self._say(f"compiled {name_of(kwargs)} in {duration_secs:.1f} s")

    def __str__(self) -> str:
        """What it has counted; "" if that is not worth a word."""
        if self.seconds < self._after and not self.found:
            return ""
        import jax

        kept = (
            jax.config.values["jax_compilation_cache_dir"]
            if jax.config.values["jax_enable_compilation_cache"]
            else None
        )
        found = f", {self.found} from {kept}" if kept else ""
        return f"programs: {self.compiled} compiled{found}, {self.seconds:.1f} s"


def name_of(said: dict[str, str | int]) -> str:
    """A program's name as a person reads it: of jit(_run_train_step) "train step"."""
    name = str(said.get("fun_name", "a program"))
    name = name.partition("(")[2].removesuffix(")") or name
    return name.removeprefix("_run_").strip("_<>").replace("_", " ")
