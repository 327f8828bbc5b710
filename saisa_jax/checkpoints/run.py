"""The checkpoints of a run: state, data position and metadata, saved atomically.

STEP/state/   the arrays
STEP/meta/    the data position; the caller's metadata; shape, dtype and checksum of every leaf of the state; versions

The data position is one for all processes (a row number), so that a run can resume with any number of them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from saisa_jax import buckets
from saisa_jax.checkpoints import storage
from saisa_jax.checkpoints.checksums import account, damaged, describe, differences, seal, unseal
from saisa_jax.checkpoints.local import LocalCheckpoints
from saisa_jax.checkpoints.storage import CheckpointError, DamagedError


def committed_steps(directory: epath.Path) -> list[int]:
    """The steps of a run's directory of checkpoints, ascending, that were written to their end."""
    paths = [path for path in buckets.children(directory) if path.name.isdigit()]
    return sorted(int(path.name) for path in paths if ocp.utils.is_checkpoint_finalized(path))


class RunCheckpointer:
    """The last steps of a run. Use it as a context manager, or call `close`.

    Args:
      directory: local or `gs://`; made if it is not there.
      keep: how many of the latest steps to keep; with two, one is left to fall back to.
      read_only: nothing there is touched; a run may be writing to it.
      local: those of the hosts' own disks, which are saved between, and restored from when they are newer.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep: int = 2,
        read_only: bool = False,
        local: LocalCheckpoints | None = None,
    ):
        if keep < 1:
            raise CheckpointError(f"keep={keep}: at least 1 is needed; set --config.training.keep_checkpoints")
        self._directory, self._local = buckets.absolute(directory), local
        self._pending: int | None = None  # being saved in the background, its outcome not yet known
        self._current: int | None = None  # saved or restored last
        kept = None if read_only else keep
        options = ocp.CheckpointManagerOptions(
            max_to_keep=kept, cleanup_tmp_directories=not read_only, create=not read_only
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> RunCheckpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            logging.error("%s", failure)  # the first error is the one to raise

    def steps(self) -> list[int]:
        """Committed steps, ascending: a step that is still being written, or was never finished, is not there."""
        return committed_steps(self._directory)

    def latest_step(self) -> int | None:
        """The newest committed step."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, data_iterator: Any, metadata: Mapping[str, Any]) -> None:
        """Copies the state off the device, takes the data position, and continues writing in the background.

        Afterwards the state's buffers may be donated. Saving once more what was saved or restored last does nothing.

        Args:
          step: larger than every step there.
          state: a tree of arrays.
          data_iterator: has `get_state` (JSON-ready, the same in every process) and `set_state`; or None.
          metadata: JSON-ready.

        Raises:
          CheckpointError: the save could not start, or the one before it has failed meanwhile.
        """
        if step == self._current:
            return
        self.wait()
        document = {
            **storage.header(),
            "data": None if data_iterator is None else data_iterator.get_state(),
            "leaves": account(state),
            "metadata": metadata,
        }
        try:
            items: dict[str, Any] = {"meta": ocp.args.JsonSave(seal(document))}
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"step {step}: metadata and data position must be JSON-ready: {error}") from error
        items["state"] = ocp.args.StandardSave(storage.stored_tree(state))
        with self._naming(step):
            started = self._manager.save(step, args=ocp.args.Composite(**items))
        if not started:
            raise CheckpointError(
                f"step {step} was not saved: {self._directory} holds {self.steps()} already; resume from the last of "
                "them, or start in another --workdir"
            )
        self._pending = self._current = step

    def restore(self, abstract_state: Any, data_iterator: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Reads a step straight into its target shardings, and sets the data iterator to where it was.

        A step on the hosts' own disks is taken if it is the newest one, and all of them have it.

        When the newest step is damaged, the one before it is taken, with a warning; the damaged one is renamed,
        since the run will write its number again. A step asked for by number is taken or refused, and so is the newest
        one of several processes, which cannot agree on another when only some of them have failed.

        Args:
          abstract_state: the expected tree; leaves have `shape`, `dtype` and, if they are to live elsewhere than on the
            first local device, `sharding`.
          data_iterator: as for `save`, restored only when everything else is; None: the stored position is ignored.
          step: None: the newest.

        Returns:
          (state, metadata).

        Raises:
          CheckpointError: no such step; a state of another structure, shape or dtype, with every difference.
          DamagedError: damaged files, with the paths of the arrays.
        """
        self.wait()
        steps = self.steps()
        if step is None and self._local is not None:
            newest = self._local.newest(max(steps, default=None))
            restored = None if newest is None else self._local.restore(newest, abstract_state, data_iterator)
            if restored is not None:
                return restored
        if not steps:
            advice = ""
            if self._local is not None:
                advice = (
                    f", and what is in {self._local.directory} cannot be used: start as the run that wrote it "
                    "(processes, hosts and mesh), or remove it to begin the stage anew"
                )
            raise CheckpointError(f"there is no finished checkpoint in {self._directory}{advice}")
        if step is not None and step not in steps:
            raise CheckpointError(f"step {step} is not in {self._directory}, which holds {steps}")
        failures: dict[int, DamagedError] = {}
        for candidate in reversed(steps) if step is None else (step,):
            try:
                restored = self._restore(candidate, abstract_state, data_iterator)
            except DamagedError as error:
                if jax.process_count() > 1:  # the others may have read theirs, and wait for this one
                    raise DamagedError(
                        f"{error}; rename {self._directory / str(candidate)} to resume without it"
                    ) from error
                failures[candidate] = error
                continue
            if failures:
                self._set_aside(failures, candidate)
            self._current = candidate
            return restored
        said = "; ".join(map(str, failures.values()))
        advice = f". No other one is there: bring one back, or remove {self._directory} to restart the stage"
        raise DamagedError(said + (advice if step is None else "")) from failures[max(failures)]

    def wait(self) -> None:
        """Returns when the last save is committed.

        Raises:
          CheckpointError: it has failed, for example on a full disk, and the step is not there.
        """
        step, self._pending = self._pending, None
        if step is not None:
            with self._naming(step):
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and frees what Orbax holds.

        Raises:
          CheckpointError: the last save has failed.
        """
        try:
            self.wait()
        finally:
            if self._local is not None:
                self._local.wait()
            self._manager.close()

    @contextlib.contextmanager
    def _naming(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax raises almost anything
            self._current = None
            self._manager.reload()  # it has written off the steps that this one was to replace
            reason = storage.first_line(error)
            raise CheckpointError(f"step {step} was not saved in {self._directory}: {reason}") from error

    def _restore(self, step: int, abstract_state: Any, data_iterator: Any) -> tuple[Any, dict[str, Any]]:
        where = f"step {step} in {self._directory}"
        meta = self._read_meta(step, where)
        lines = differences(meta["leaves"], describe(abstract_state))
        if lines:
            raise CheckpointError(f"{where} is of another model or recipe: {'; '.join(lines)}")
        if data_iterator is not None and meta["data"] is None:
            raise CheckpointError(f"{where} holds no data position")
        template = storage.template(abstract_state)
        restored = self._read(step, "state", ocp.args.StandardRestore(storage.stored_tree(template)), where)
        state = storage.complete(restored, template)
        bad = damaged(state, meta["leaves"])
        if bad:
            raise DamagedError(f"{where} is damaged; other values than were saved: {', '.join(bad)}")
        if data_iterator is not None:
            data_iterator.set_state(meta["data"])
        return jax.tree.unflatten(jax.tree.structure(abstract_state), state.values()), meta["metadata"]

    def _read_meta(self, step: int, where: str) -> dict[str, Any]:
        meta = self._read(step, "meta", ocp.args.JsonRestore(), where, unseal)
        storage.check_format(meta, where)
        return meta

    def _read(self, step: int, item: str, args: Any, where: str, then: Callable[[Any], Any] = lambda item: item) -> Any:
        """One item of a step; `then` runs on it as part of the reading."""
        whole = ocp.args.Composite(**{item: args})
        return storage.read(f"{item} of {where}", lambda: then(self._manager.restore(step, args=whole)[item]))

    def _set_aside(self, failures: Mapping[int, DamagedError], used: int) -> None:
        """Renames damaged steps, once it is certain that the run resumes from an older one."""
        for step, error in failures.items():
            aside = self._directory / f"{step}.damaged"
            logging.error("%s. FALLING BACK TO STEP %d; the damaged one is now %s", error, used, aside)
            buckets.remove(aside)
            buckets.move(self._directory / str(step), aside)
        self._manager.reload()
