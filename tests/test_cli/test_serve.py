"""`python -m saisa_jax serve` as a process: flags, and the signal that ends it."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import pytest

from saisa_jax import __main__ as main
from saisa_jax.checkpoints import save_model
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.models.saisa import init_params
from saisa_jax.testing.configs import tiny_config


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--rows=0"], "--rows=0 must be above 0"),
        (["--timeout=-1"], "--timeout=-1.0 must be above 0"),
        (["--queue=-1"], "--queue=-1 must be at least 0"),
        (["--host=256.0.0.1"], "--host=256.0.0.1 --port=8000"),
        (["--port=70000"], "--port=70000"),
    ],
)
def test_flags_that_cannot_be(flags, said, capsys):
    assert main.main(["serve", "--checkpoint=none", *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_port_in_use(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main.main(["serve", "--checkpoint=none", f"--port={port}"]) == 2
    assert f"--port={port}" in capsys.readouterr().err


@pytest.mark.slow
def test_sigterm_under_load(tmp_path: Path) -> None:
    """Rows are answered, those who wait get 503, nobody gets half an answer, and the process ends with 0."""
    config = tiny_config("saisa")
    save_model(
        tmp_path / "model", init_params(config.model_for("finetune"), jax.random.key(1)), config,
        load_tokenizer("easy_vqa"), {"stage": "finetune"},
    )  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "saisa_jax", "serve", f"--checkpoint={tmp_path / 'model'}", f"--port={port}"]
    process = subprocess.Popen([*command, "--rows=2", "--queue=30"])
    try:

        def ask(path: str, body: Any = None) -> tuple[int, Any]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            head = {"Content-Type": "application/json"}
            connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, head)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

        def healthy() -> bool:
            try:
                return ask("/health")[0] == 200
            except OSError:
                return False

        end = time.monotonic() + 240
        while not healthy() and time.monotonic() < end:
            time.sleep(0.2)
        body = {"messages": [{"role": "user", "content": "is it red?"}], "max_tokens": 100, "temperature": 3.0}
        told: list[tuple[int, Any]] = []
        clients = [
            threading.Thread(target=lambda: told.append(ask("/v1/chat/completions", body))) for _ in range(20)
        ]  # fmt: skip
        for client in clients:
            client.start()
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        for client in clients:
            client.join(60)
        assert process.wait(60) == 0
        statuses = [status for status, _ in told]
        assert len(told) == 20 and set(statuses) <= {200, 503} and 200 in statuses and 503 in statuses, statuses
        assert all(
            answer["choices"][0]["finish_reason"] in ("stop", "length") for status, answer in told if status == 200
        )
    finally:
        process.kill()
