"""The processes of a run: started together, and informed of what happens to one of them."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saisa_jax import parallel
from saisa_jax.batch import HostBatch
from saisa_jax.compilation import share_programs
from saisa_jax.config import ConfigError, DistributedConfig
from saisa_jax.data.pipeline import TrainIterator
from saisa_jax.parallel import OtherProcessError

HINT_SECONDS = 60  # of waiting for the others, until it is said how they are started
LEAVE_SECONDS = 30  # that a process which failed alone waits for the others before it ends


def start(config: DistributedConfig, flags: str = "--config.distributed.") -> None:
    """Joins the other processes of the run; nothing of jax may have run before. With one process it does nothing.

    Args:
      config: who they are.
      flags: how the program spells the fields of `config`.

    Raises:
      ConfigError: the other processes are not known, or the coordinator cannot be reached. When the others do not come
        within `timeout`, the process ends with a message and status 1.
    """
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        # Simulated devices share a pool of as many threads as there are cores. With fewer than devices, those that got
        # one may wait forever for those that did not.
        os.environ.setdefault("NPROC", "64")
    if config.coordinator is None:
        if jax.process_count() > 1 and not jax.distributed.is_initialized():
            raise ConfigError(
                f"these devices belong to {jax.process_count()} processes, and this one was started alone: "
                f"set {flags}coordinator=auto, on every host"
            )
        return
    if jax.distributed.is_initialized():
        return
    given: dict[str, Any] = {}
    if config.coordinator == "auto":
        _check_slurm(os.environ, flags)
    else:
        given = {
            "coordinator_address": config.coordinator,
            "num_processes": config.num_processes,
            "process_id": config.process_id,
            "cluster_detection_method": "deactivate",  # all devices of the host are this process's
        }
    joined = threading.Event()
    threading.Thread(target=_watch, args=(config, joined, flags), daemon=True).start()
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=config.timeout + HINT_SECONDS,  # `_watch` is earlier, and says more
            shutdown_timeout_seconds=LEAVE_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{flags}coordinator={config.coordinator}: {str(error).splitlines()[0]}; {_how(config, flags)}"
        ) from error
    finally:
        joined.set()
    share_programs()
    logging.info("process %d of %d", jax.process_index(), jax.process_count())


def _check_slurm(environment: Mapping[str, str], flags: str = "--config.distributed.") -> None:
    """Raises ConfigError where jax would leave GPUs idle: under Slurm it gives each task one of them."""
    gpus, tasks = (environment.get(name, "") for name in ("SLURM_GPUS_ON_NODE", "SLURM_NTASKS_PER_NODE"))
    if gpus and tasks and gpus != tasks:
        raise ConfigError(
            f"{flags}coordinator=auto gives each task one GPU, and a node has {gpus} GPUs and {tasks} "
            f"tasks: set --ntasks-per-node={gpus}; or, for one process on each node, name HOST:PORT"
        )


def _watch(config: DistributedConfig, joined: threading.Event, flags: str) -> None:
    """Says what is missing while `start` waits, and ends the process when it has waited long enough."""
    first = min(HINT_SECONDS, config.timeout)
    if joined.wait(first):
        return
    if first < config.timeout:
        logging.warning("still waiting for the other processes after %d s: %s", first, _how(config, flags))
        if joined.wait(config.timeout - first):
            return
    print(
        f"ConfigError: the other processes did not come within {flags}timeout={config.timeout} s: "
        f"{_how(config, flags)}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # jax would abort with a stack of its own


def _how(config: DistributedConfig, flags: str) -> str:
    if config.coordinator == "auto":
        return "start the same command on every host; outside of TPU pods, Slurm and Open MPI name a HOST:PORT"
    return (
        f"start it on every host, with {flags}process_id=0 to {(config.num_processes or 1) - 1}, each "
        f"once; all of them must reach {config.coordinator}, a port of process 0's host that is free"
    )


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def own(directory: epath.Path) -> epath.Path:
    """Where this process writes what each of them has to say: the directory itself, or process_1, ... in it."""
    return directory if is_first() else directory / f"process_{jax.process_index()}"


@contextlib.contextmanager
def exit_on_lost_process() -> Iterator[None]:
    """Around what all processes do with each other: when one of them dies, this one ends at once, with status 1.

    It says so and leaves: to unwind would be to wait for the dead one. (Where the devices do not notice, jax itself
    ends the others after 100 s without a heartbeat.)
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        print(
            f"OtherProcessError: process {jax.process_index()} cannot continue: {str(error).splitlines()[0]}. If "
            "another one has ended, its log says why. The same command on every host goes on from what is saved",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


_WORD = 3  # numbers of a process's word, before the waits


class UnreadError(Exception):
    """The data of a step could not be read; `reason` is this process's own failure, or says which one has failed."""

    def __init__(self, reason: Exception):
        super().__init__(str(reason))
        self.reason = reason


class Lost(NamedTuple):
    """What all processes together have lost of a step's data."""

    dropped: int  # samples that could not be used
    cut_tokens: int  # text tokens cut off the ends of samples that were too long
    unusable: int  # of the dropped ones, those that `data.max_drop` limits
    waits: tuple[float, ...] = ()  # seconds that each process has waited for its rows


class Alarm:
    """Rings once when so many minutes have passed since it rang or was wound; 0: never."""

    def __init__(self, minutes: float):
        self._seconds = 60 * minutes
        self.wind()

    def wind(self) -> None:
        """It begins anew."""
        self._since = time.monotonic()

    def rings(self) -> bool:
        """Whether the minutes have passed."""
        if not self._seconds or time.monotonic() - self._since < self._seconds:
            return False
        self.wind()
        return True


class ProcessSync:
    """What the processes of a run send each other with every step, so that they all do the same.

    A message goes through the devices like the step itself: it is sent when the step has been started, and received
    when its metrics are read. One process alone receives its own at once.

    Attributes:
      stopping: a process was asked to stop; all of them learn it at the same step.
      saving: the first process wants a checkpoint, by its clock; likewise.
    """

    def __init__(self, mesh: Mesh):
        self.stopping = self.saving = False
        self._mesh, self._waited = mesh, 0.0
        self._alone = jax.process_count() == 1
        self._of_devices = NamedSharding(mesh, PartitionSpec(*parallel.AXES))
        self._gather = jax.jit(_gather, out_shardings=parallel.replicated(mesh))
        self._failure: Exception | None = None

    def read(self, data: TrainIterator) -> HostBatch:
        """The next batch; once one cannot be read and others wait for this process, padding: they will learn of it.

        The weights of the padding are NaN, so that no process is changed by a step that is not whole.

        Raises:
          UnreadError: it cannot be read, and there is no other process.
        """
        if self._failure is None:
            began = time.monotonic()
            try:
                batch = next(data)
                self._waited = time.monotonic() - began
                return batch
            except Exception as error:  # whatever a disk or a decoder raises
                if self._alone:
                    raise UnreadError(error) from error
                self._failure = error
        padding = data.padding()
        padding.batch["loss_weights"][:] = np.nan
        return padding

    def send(self, stop: bool, lost: np.ndarray, rows: int, save: bool = False) -> Any:
        """Sends this process's part of a step.

        Args:
          stop: it was asked to stop.
          save: it is time for a checkpoint; heard of the first process alone.
          lost: [own rows, 3]; see `HostBatch`.
          rows: of the whole batch.

        Returns:
          what `receive` takes.
        """
        milliseconds = round(1000 * self._waited)
        if self._alone:
            self.stopping, self.saving = stop, self.saving or save
            return np.asarray([0, 0, 0, milliseconds, *lost.sum(0)])
        failed = 0 if self._failure is None else jax.process_index() + 1
        said = np.zeros(_WORD + jax.process_count(), np.int32)
        said[:_WORD] = stop, failed, save and is_first()
        said[_WORD + jax.process_index()] = milliseconds
        words = jax.make_array_from_callback(
            (*self._mesh.devices.shape, len(said)), self._of_devices, lambda index: said.reshape(1, 1, 1, -1)
        )
        return self._gather(words, parallel.to_device(lost, self._mesh, rows))

    def receive(self, sent: Any) -> Lost:
        """What all processes have sent.

        Raises:
          UnreadError: one of them could not read its part of the data.
        """
        stop, failed, save, *rest = np.asarray(sent).tolist()
        if failed:
            said = f"process {failed - 1} could not read its part of the data; its own log says why"
            raise UnreadError(self._failure or OtherProcessError(said))
        self.stopping |= bool(stop)
        self.saving |= bool(save)
        *waits, dropped, cut_tokens, unusable = rest
        return Lost(dropped, cut_tokens, unusable, tuple(wait / 1000 for wait in waits))


def _gather(words: Any, lost: Any) -> Any:
    """[stop, failed, save, waits ..., dropped, cut tokens, unusable]; rows that several devices hold count once."""
    return jnp.concatenate([words.max(axis=(0, 1, 2)), lost.sum(axis=0)])
