"""`python -m saisa_jax serve`: a model behind OpenAI's chat-completions interface, and a page to try it.

POST /v1/chat/completions answers many clients at once by continuous batching; GET / is the page, /health is 200 when
the programs are compiled, /metrics is for Prometheus. SIGTERM ends it when the answers that are under way are given.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import uvicorn
from absl import logging

from saisa_jax.cli import devices
from saisa_jax.cli.parser import Parser
from saisa_jax.config import ConfigError
from saisa_jax.inference.model import VisionLanguageModel, load
from saisa_jax.inference.quantize import QUANTIZATIONS
from saisa_jax.serving.app import Server, Settings
from saisa_jax.serving.engine import Engine
from saisa_jax.serving.pictures import PictureLimits
from saisa_jax.serving.questions import Answers

KEY = "SAISA_JAX_API_KEY"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def main(argv: Sequence[str]) -> int:
    """The verb `serve`.

    Raises:
      CheckpointError, ConfigError, DataError: the model cannot be loaded or is not served, or a flag is wrong.
    """
    flags = _parser().parse_args(argv)
    check_limits(flags, "rows")
    listening = listen(flags.host, flags.port)  # or else it would be known only after minutes of loading
    model = load(
        flags.checkpoint,
        **devices.placed(flags),
        quantize=flags.quantize,
        image_cache_bytes=flags.cache_mb * 10**6,
    )
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)  # what is compiled, and what it takes
    serve(Engine(model, flags.rows, flags.max_images), settings_of(flags, model), listening)
    return 0


def check_limits(flags: Any, *more: str) -> None:
    """Raises ConfigError for flags of `add_server_flags`, and `more` numbers, that are not above 0."""
    for name in (*more, "max_new_tokens", "timeout", "max_body_mb", "max_picture_mb", "max_megapixels"):
        if getattr(flags, name) <= 0:
            raise ConfigError(f"--{name}={getattr(flags, name)} must be above 0")
    if flags.queue < 0:
        raise ConfigError(f"--queue={flags.queue} must be at least 0")


def settings_of(flags: Any, model: VisionLanguageModel) -> Settings:
    """What the flags of `add_server_flags` allow."""
    settings = Settings(
        name=flags.name or model.config.name,
        queue=flags.queue,
        seconds=flags.timeout,
        body_bytes=int(flags.max_body_mb * 1e6),
        max_new_tokens=flags.max_new_tokens,
        pictures=PictureLimits(
            file_bytes=int(flags.max_picture_mb * 1e6),
            pixels=int(flags.max_megapixels * 1e6),
            hosts=frozenset(filter(None, flags.allow_hosts.lower().split(","))),
        ),
        api_key=flags.api_key or os.environ.get(KEY, ""),
    )
    if flags.host not in LOOPBACK and not settings.api_key:
        logging.warning("--host=%s without --api_key: whoever reaches this machine may ask", flags.host)
    return settings


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients may connect to.

    Raises:
      ConfigError: the port is in use, or may not be used.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--host={host} --port={port}: {error}") from error


def serve(engine: Answers, settings: Settings, listening: socket.socket) -> None:
    """Starts the engine, and serves until SIGTERM or Ctrl-C, which lets answers end; a second one does not."""
    host, port = listening.getsockname()[:2]
    config = uvicorn.Config(Server(engine, settings).app(), log_level="warning", lifespan="off", server_header=False)
    server = _Draining(config, engine)
    engine.start()
    url = f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
    print(f"{settings.name} at {url} as soon as /health says so", file=sys.stderr, flush=True)
    server.run(sockets=[listening])
    if engine.ready.is_set() and not server.force_exit:
        engine.drain()
        engine.join()


class _Draining(uvicorn.Server):
    """A server whose first signal lets answers end."""

    def __init__(self, config: uvicorn.Config, engine: Answers) -> None:
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        del frame
        self.force_exit = self.should_exit and sig in (signal.SIGINT, signal.SIGTERM)
        self.should_exit = True
        self._engine.drain()


def _parser() -> Parser:
    parser = Parser("serve", __doc__)
    parser.add_argument("--checkpoint", required=True, help="a finished model: WORKDIR/finetune/model, or an import")
    devices.add_model_flags(parser)
    parser.add_argument("--quantize", choices=QUANTIZATIONS, help="int8: 8-bit weights (needs qwix)")
    parser.add_argument("--rows", type=int, default=8, help="questions that are answered at once (default 8)")
    add_server_flags(parser)
    return parser


def add_server_flags(parser: Parser) -> None:
    """What every server of this program can be told: `settings_of` reads it, and `listen`."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine's own alone)")
    parser.add_argument("--api_key", default="", help=f"that clients must send; or ${KEY}, which `ps` does not show")
    parser.add_argument("--name", default="", help="of the model, in requests; by default its recipe's")
    parser.add_argument("--allow_hosts", default="", help="fetch pictures from these hosts: a.org,b.org (default none)")
    numbers: list[tuple[str, Any, str]] = [
        ("port", 8000, "to listen at"),
        ("queue", 64, "questions that may wait; more get 429"),
        ("max_images", 4, "pictures of a question"),
        ("max_new_tokens", 256, "tokens of an answer whose request does not say"),
        ("cache_mb", 1024, "megabytes of pictures' keys and values that are kept for further questions"),
        ("timeout", 300.0, "seconds for a request, after which it gets 504"),
        ("max_body_mb", 64.0, "megabytes of a request"),
        ("max_picture_mb", 20.0, "megabytes of a picture's file"),
        ("max_megapixels", 40.0, "millions of pixels of a picture"),
    ]
    for name, default, about in numbers:
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{about} (default {default:g})")
