"""A server in a thread of this process, for measuring and for programs of one's own."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

from saisa_jax.serving.app import Server


@contextlib.contextmanager
def in_background(server: Server | Starlette) -> Iterator[str]:
    """Serves on a free port of this machine's own address, and gives the URL; the engine is the caller's to start."""
    listening = socket.create_server(("127.0.0.1", 0))
    app = server.app() if isinstance(server, Server) else server
    config = uvicorn.Config(app, log_level="warning", lifespan="off")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, name="server", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join(20)
