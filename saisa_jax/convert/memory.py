"""How much memory a conversion took, and how much it may take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

SLACK = 2 * 2**30


def peak_bytes() -> int:
    """The most memory that this process has held so far; 0 where the system does not report it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM")), "VmHWM: 0 kB")
    return int(line.split()[1]) * 1024


def allowance(leaves: Mapping[str, Mapping[str, Any]], slack: int = SLACK) -> int:
    """The arrays held on this host, 1.25 x the largest of them, and 2 GiB.

    Args:
      leaves: {path: {"shape", "dtype"}}.
    """
    sizes = [math.prod(leaf["shape"]) * jnp.dtype(leaf["dtype"]).itemsize for leaf in leaves.values()]
    return sum(sizes) + int(1.25 * max(sizes, default=0)) + slack
