"""`python -m saisa_jax_vllm`: OpenAI's chat completions, pictures included, answered by a vLLM that knows no pictures.

Pictures are encoded here, by the checkpoint, and laid into the store; vLLM, started with the connector on the same
store, answers. Everything around it (protocol, limits, the page at /, /metrics) is that of `python -m saisa_jax serve`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import logging

from saisa_jax.cli import devices
from saisa_jax.cli.parser import Parser
from saisa_jax.cli.process import quiet_libraries
from saisa_jax.cli.serve import add_server_flags, check_limits, listen, serve, settings_of
from saisa_jax.config import ConfigError
from saisa_jax.errors import UserError
from saisa_jax.inference.model import load
from saisa_jax_vllm.client import Client
from saisa_jax_vllm.engine import VllmEngine
from saisa_jax_vllm.store import Store, StoreError


def main(argv: Sequence[str]) -> int:
    """The program.

    Raises:
      UserError: a flag is wrong, the model is not served, or vLLM serves another one.
    """
    flags = _parser().parse_args(argv)
    check_limits(flags, "concurrent", "store_mb", "tolerance")
    listening = listen(flags.host, flags.port)
    try:
        client, store = Client(flags.vllm), Store(flags.store, flags.store_mb * 10**6)
    except (ValueError, StoreError) as error:
        raise ConfigError(str(error)) from error
    model = load(flags.checkpoint, **devices.placed(flags), image_cache_bytes=flags.cache_mb * 10**6)
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    engine = VllmEngine(model, client, store, flags.concurrent, flags.max_images, flags.tolerance, flags.wait)
    serve(engine, settings_of(flags, model), listening)
    return 0


def _parser() -> Parser:
    parser = Parser(description=__doc__, prog="python -m saisa_jax_vllm")
    parser.add_argument("--checkpoint", required=True, help="a finished model: WORKDIR/finetune/model, or an import")
    parser.add_argument("--vllm", default="http://127.0.0.1:8001", help="where vLLM is (default %(default)s)")
    parser.add_argument("--store", default="/dev/shm/saisa", help="the folder that its connector reads "
                        "(default %(default)s: shared memory)")  # fmt: skip
    parser.add_argument("--store_mb", type=int, default=8192, help="megabytes of it (default 8192)")
    parser.add_argument("--concurrent", type=int, default=256, help="questions at once (default 256, which is vLLM's)")
    parser.add_argument("--tolerance", type=float, default=0.25, help="by how much log-probabilities may differ from "
                        "vLLM's, which has its own dtype and kernels (default 0.25)")  # fmt: skip
    parser.add_argument("--wait", type=float, default=600.0, help="seconds for vLLM to come up (default 600)")
    devices.add_model_flags(parser)
    add_server_flags(parser)
    return parser


if __name__ == "__main__":
    quiet_libraries()
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, OSError) as problem:
        print(f"saisa_jax_vllm: {problem}", file=sys.stderr)
        sys.exit(2)
