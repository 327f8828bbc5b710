"""What a program does to its own process and a library must not: here, fewer lines about other libraries' insides."""

from __future__ import annotations

import functools
import logging
import os
import sys
from typing import Any

from absl import logging as absl_logging

_ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "2",  # errors alone, of XLA
    "TPU_STDERR_LOG_LEVEL": "2",  # and of libtpu, which also looks for a TPU where there is none
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # needed for its tokenizers; it announces that torch is missing
}


@functools.cache
def quiet_libraries() -> None:
    """Silences what JAX, libtpu, transformers and Orbax say about themselves. What the environment sets already, stays,
    but for the one flag of JAX under which no model runs.

    For `train.py`, `eval.py` and `python -m saisa_jax` alone, before anything imports jax: importing the package leaves
    loggers, hooks and environment as they are.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.pop("JAX_NUMPY_RANK_PROMOTION", None)  # norms and biases are broadcast
    logging.getLogger("jax._src.xla_bridge").addFilter(_at_least_a_warning)  # the backends that it did not find
    absl_logging.get_absl_logger().addFilter(_quiet_orbax)  # not by name: absl has to make its own kind of logger
    logging.getLogger("asyncio").addFilter(_quiet_asyncio)
    sys.unraisablehook = functools.partial(_quiet_unraisable, sys.unraisablehook)


def _at_least_a_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def _quiet_orbax(record: logging.LogRecord) -> bool:
    """Lets Orbax's warnings and errors pass, not its dozens of lines about every save; tracebacks are ours to raise."""
    if "orbax" in record.pathname:
        record.exc_info = None
        return _at_least_a_warning(record)
    return True


def _quiet_asyncio(record: logging.LogRecord) -> bool:
    """Drops the pages about Orbax's other reads when one of them has failed; that one is raised."""
    return not (record.exc_info and "exception was never retrieved" in record.getMessage())


def _quiet_unraisable(hook: Any, unraisable: Any) -> None:
    """When one of Orbax's reads fails, the others are dropped, and each of them would print pages."""
    code = getattr(unraisable.object, "cr_code", None)
    abandoned = "orbax" in code.co_filename if code else str(unraisable.exc_value) == "Event loop is closed"
    if not abandoned:
        hook(unraisable)
