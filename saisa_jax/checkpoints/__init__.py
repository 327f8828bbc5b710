"""Checkpoints of a run (`run.py`, and `local.py` on its hosts' own disks) and finished models (`model.py`).

No other package uses Orbax.

Orbax restores flipped bytes as wrong numbers, and casts to another dtype, both silently. So whatever is read back
here is compared with its account (shapes, dtypes, checksums), which was stored beside it (`checksums.py`).
"""

from saisa_jax.checkpoints.checksums import checksums
from saisa_jax.checkpoints.local import LocalCheckpoints
from saisa_jax.checkpoints.model import (
    copy_sidecar,
    is_model,
    load_model,
    local_model,
    read_account,
    save_model,
    sidecar_files,
)
from saisa_jax.checkpoints.run import RunCheckpointer, committed_steps
from saisa_jax.checkpoints.storage import CheckpointError, DamagedError

__all__ = [
    "CheckpointError",
    "DamagedError",
    "LocalCheckpoints",
    "RunCheckpointer",
    "checksums",
    "committed_steps",
    "copy_sidecar",
    "is_model",
    "load_model",
    "local_model",
    "read_account",
    "save_model",
    "sidecar_files",
]
