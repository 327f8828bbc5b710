"""Checkpoints on the disks of the hosts, between those that all of them can read: quick to write, lost with their host.

    DIR/RUN/STEP/process-00003/arrays.bin      this process's parts of the arrays, one after the other
    DIR/RUN/STEP/process-00003/account.json    where each part lies; what `run.py` stores beside a state; written last

(Orbax has such a tier, `experimental.emergency`, for several slices that hold the same state, and one that needs a
service on the nodes of GKE. This one needs nothing, and serves one slice: whoever starts again with the same processes
on the same hosts and mesh reads its own parts back. Any other start takes the last checkpoint of `run.py`.)
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from saisa_jax import buckets
from saisa_jax.checkpoints import storage
from saisa_jax.checkpoints.checksums import account, damaged, describe, differences, flatten, seal, unseal

KEPT = 2  # steps: a process may be killed before it has written the newest one
RUN = "local_run"  # a file in the stage's directory


class LocalCheckpoints:
    """The last steps of a run on this host's disk; every process makes one, at the same time.

    A step that cannot be written, or read again, is told of and left out: there is always the last one of `run.py`.

    Args:
      directory: on this host, for any number of runs.
      stage: the stage's directory, which all processes can read; says which run this is.

    Attributes:
      directory: of this run.
    """

    def __init__(self, directory: str | os.PathLike[str], stage: epath.Path):
        self.directory = Path(directory).expanduser() / _name_of_run(stage)
        self._own = f"process-{jax.process_index():05d}"
        self._writing: threading.Thread | None = None

    def save(self, step: int, state: Any, data_iterator: Any, metadata: Mapping[str, Any]) -> None:
        """Copies this process's parts of the state off its devices, and continues writing in the background.

        Args: as of `RunCheckpointer.save`.
        """
        self.wait()
        document = {
            **storage.header(),
            "processes": jax.process_count(),
            "data": None if data_iterator is None else data_iterator.get_state(),
            "leaves": account(state),
            "metadata": metadata,
        }
        parts = {path: _parts(leaf) for path, leaf in flatten(state).items()}
        self._writing = threading.Thread(target=self._write, args=(step, parts, document), name="local checkpoint")
        self._writing.start()

    def newest(self, than: int | None) -> int | None:
        """The newest step that every process holds, if it is newer than another one; the same in all processes."""
        own = [step for step in self._steps() if step > (-1 if than is None else than)][-KEPT:]
        padded = np.array(own + [-1] * (KEPT - len(own)), np.int32)
        held = np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, KEPT)
        common = set.intersection(*(set(row.tolist()) for row in held)) - {-1}
        return max(common, default=None)

    def restore(self, step: int, abstract_state: Any, data_iterator: Any) -> tuple[Any, dict[str, Any]] | None:
        """Reads a step that every process holds, and sets the data iterator to where it was.

        Args:
          step: of `newest`.
          abstract_state: as for `RunCheckpointer.restore`.
          data_iterator: likewise.

        Returns:
          (state, metadata); None if one of the processes cannot read its parts, or they are damaged: of none of them.
        """
        state, document = None, {}
        try:
            state, document = self._read(step, abstract_state)
        except Exception as error:  # whatever a disk raises
            logging.warning("the local checkpoint of step %d cannot be used: %s", step, storage.first_line(error))
        read = np.asarray(multihost_utils.process_allgather(np.array(state is not None)))
        if state is None or not read.all():
            return None
        bad = damaged(state, document["leaves"])
        if bad:
            logging.warning("the local checkpoint of step %d is damaged: %s", step, ", ".join(bad))
            return None
        if data_iterator is not None:
            data_iterator.set_state(document["data"])
        return jax.tree.unflatten(jax.tree.structure(abstract_state), state.values()), document["metadata"]

    def wait(self) -> None:
        """Returns when the last step is written."""
        if self._writing is not None:
            self._writing.join()
        self._writing = None

    def remove(self) -> None:
        """Takes away what this run has here, which has ended."""
        self.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _steps(self) -> list[int]:
        """Those that this process has written to their end, ascending."""
        found = self.directory.glob(f"*/{self._own}/account.json")
        return sorted(int(path.parent.parent.name) for path in found)

    def _write(self, step: int, parts: Mapping[str, Any], document: dict[str, Any]) -> None:
        folder = self.directory / str(step) / self._own
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            places: dict[str, dict[str, list[int]]] = {}
            with (folder / "arrays.bin").open("wb") as file:
                for path, of_path in parts.items():
                    places[path] = {}
                    for index, part in of_path.items():
                        places[path][index] = [file.tell(), *part.shape]
                        file.write(np.ascontiguousarray(part).tobytes())
                file.flush()
                os.fsync(file.fileno())
            buckets.write_text(epath.Path(folder / "account.json"), json.dumps(seal({**document, "places": places})))
            steps = self._steps()
            kept = [number for number in steps if number <= step][-KEPT:]
            for old in set(steps) - set(kept):  # larger ones could not be used: the run went on from before them
                shutil.rmtree(self.directory / str(old) / self._own)
                with contextlib.suppress(OSError):  # another process of this host has its own there
                    (self.directory / str(old)).rmdir()
        except OSError as error:
            logging.warning("the local checkpoint of step %d was not written: %s", step, error)
            shutil.rmtree(folder, ignore_errors=True)

    def _read(self, step: int, abstract_state: Any) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        folder = self.directory / str(step) / self._own
        document = unseal(json.loads((folder / "account.json").read_text()))
        storage.check_format(document, str(folder))
        lines = differences(document["leaves"], describe(abstract_state))
        if lines or document["processes"] != jax.process_count():
            raise ValueError(f"it is of {document['processes']} processes, or of another model: {'; '.join(lines)}")
        content = np.memmap(folder / "arrays.bin", np.uint8, "r")

        def read(path: str, leaf: Any, index: Any) -> np.ndarray:
            start, *shape = document["places"][path][_spell(index, leaf.shape)]
            size = int(np.prod(shape)) * leaf.dtype.itemsize
            return np.array(content[start : start + size]).view(leaf.dtype).reshape(shape)

        arrays: dict[str, jax.Array] = {
            path: jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: read(path, leaf, index))  # noqa: B023
            for path, leaf in storage.template(abstract_state).items()
        }
        return arrays, document


def _name_of_run(stage: epath.Path) -> str:
    """A random name that a stage keeps: what another run has left on this host is not taken for this one's."""
    token = 0
    if jax.process_index() == 0:
        stage.mkdir(parents=True, exist_ok=True)
        if not (stage / RUN).exists():
            buckets.write_text(stage / RUN, str(secrets.randbelow(2**31)))
        token = int((stage / RUN).read_text())
    return f"{int(multihost_utils.broadcast_one_to_all(np.array(token, np.int32))):08x}"


def _parts(leaf: jax.Array) -> dict[str, np.ndarray]:
    """What this process holds of an array, each part once, by its place."""
    shards = {_spell(shard.index, leaf.shape): shard for shard in leaf.addressable_shards}
    return {index: np.array(shard.data) for index, shard in shards.items()}  # a copy: the step donates its buffers


def _spell(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """A place in an array: "0:4,8:16"."""
    bounds = [axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True)]
    return ",".join(f"{start}:{stop}" for start, stop in bounds)
