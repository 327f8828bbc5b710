"""A directory for one run where there are no locks: a small file that its holder keeps renewing.

`DIRECTORY/.lease` is a JSON object {"holder", "host", "pid", "time", "token", "beat"}. Its holder rewrites it every
`renewal` seconds. Another run that finds it watches it: if it changes, its holder lives, and the run is refused; if it
does not for 4 renewals by the *watcher's own* clock, its holder is dead, and the run takes over. (The time in it is for
people alone: no two hosts' clocks are compared.)

A file of a bucket is written whole and read as last written, but "create it unless it is there" is not to be had
through `epath`. So whoever has written the lease waits a settling moment and reads it back: of several that start
together, the last to write is the one that stays. What this guarantees: of two runs, at most one continues. What it
does
not: a run that was frozen between looking and writing for longer than the settling moment, or through 4 renewals, works
beside the other until its next renewal or check, `renewal` seconds at most, when it finds that its lease was taken and
stops.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from absl import logging

from saisa_jax import buckets
from saisa_jax.errors import UserError

RENEWAL = 15.0  # seconds
SETTLING = 2.0  # seconds
LIFE = 4  # renewals


class RunLockedError(UserError, RuntimeError):
    """Another process works in the same directory."""


class Lease:
    """Holds a directory while it is entered, and renews the lease from a thread of its own.

    Args:
      directory: local or `gs://`; must be there.
      renewal: seconds between renewals.
      settling: seconds after which what others wrote at the same time can be read.
    """

    def __init__(self, directory: str | os.PathLike[str], renewal: float = RENEWAL, settling: float = SETTLING):
        self._directory = buckets.place(directory)
        self._path = self._directory / ".lease"
        self._renewal, self._settling = renewal, settling
        self._token, self._beat = secrets.token_hex(8), 0
        self._renewed = 0.0  # by this process's clock
        self._robber: str | None = None
        self._one_at_a_time = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        """Raises:
        RunLockedError: another run holds the directory, or takes it at this moment.
        """
        self._wait_for_silence()
        self._write()
        time.sleep(self._settling)
        seen = self._read()
        if not self._is_mine(seen):
            raise self._refused(seen)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        try:
            if self._is_mine(self._read()):
                self._path.unlink()
        except OSError as failure:  # it will be found dead
            logging.warning("%s was not removed: %s", self._path, failure)

    def check(self) -> None:
        """Checks that this run may continue to write; reads the lease only if its renewal is overdue, as after a sleep.

        Raises:
          RunLockedError: another run has taken it over.
        """
        if self._robber is None and time.monotonic() - self._renewed > 2 * self._renewal:
            self._renew()
        if self._robber is not None:
            raise RunLockedError(
                f"{self._directory} was taken over by {self._robber}, which must have seen no renewal by this run "
                f"for {LIFE * self._renewal:g} s; this one stops here, and writes nothing more"
            )

    def _wait_for_silence(self) -> None:
        """Returns when there is no lease, or one that is not renewed."""
        found = self._read()
        if found is None:
            return
        life = LIFE * self._renewal
        logging.warning(
            "%s is held by %s; if its lease is not renewed for %g s, this run takes over", self._directory,
            _holder(found), life,
        )  # fmt: skip
        until = time.monotonic() + life
        while time.monotonic() < until:
            time.sleep(min(1.0, self._renewal / 4))
            seen = self._read()
            if seen is None:
                return
            if seen != found:
                raise self._refused(seen if _parsed(seen) else found)  # half written: the same holder's
        logging.warning("%s is dead: its lease of %s is taken over", _holder(found), self._directory)

    def _refused(self, seen: str | None) -> RunLockedError:
        return RunLockedError(
            f"{self._directory} is in use by {_holder(seen)}, which lives: it renews its lease every {self._renewal:g} "
            f"s. Wait until it has ended (after a kill its lease is free in {LIFE * self._renewal:g} s), stop it, or "
            "choose another --workdir"
        )

    def _keep(self) -> None:
        while not self._ended.wait(self._renewal) and self._robber is None:
            self._renew()

    def _renew(self) -> None:
        with self._one_at_a_time:
            try:
                seen = self._read()
                if self._is_mine(seen):
                    self._write()
                elif self._robber is None:
                    self._robber = _holder(seen)
                    logging.error("%s was taken over by %s", self._directory, self._robber)
            except Exception as error:  # a bucket may be out of reach for a while; no other run can write to it either
                logging.warning("the lease %s was not renewed: %s", self._path, error)

    def _write(self) -> None:
        self._beat += 1
        host, pid = socket.gethostname(), os.getpid()
        document = {"holder": f"process {pid} on {host}", "host": host, "pid": pid}
        document |= {"time": datetime.now(UTC).isoformat(timespec="seconds"), "token": self._token, "beat": self._beat}
        self._path.write_text(json.dumps(document))
        self._renewed = time.monotonic()

    def _read(self) -> str | None:
        """What the lease says; None: there is none."""
        try:
            return self._path.read_text()
        except FileNotFoundError:
            return None

    def _is_mine(self, seen: str | None) -> bool:
        return _parsed(seen).get("token") == self._token


def _parsed(seen: str | None) -> dict[str, Any]:
    """On a disk a lease can be met half written."""
    try:
        document = json.loads(seen or "{}")
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _holder(seen: str | None) -> str:
    document = _parsed(seen)
    since = f" (last renewed at {document['time']} by its clock)" if "time" in document else ""
    return f"{document.get('holder', 'another process')}{since}"
