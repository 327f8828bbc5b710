"""Plans of batches, the ring of pictures, and answers over a mesh."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

import saisa_jax
from saisa_jax import parallel
from saisa_jax.checkpoints import save_model
from saisa_jax.config import MeshConfig
from saisa_jax.data.text.conversation import Encoded
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.evaluation.runner import Settings, evaluate
from saisa_jax.inference.batches import Prompt, plan_batches, schedule, simulate
from saisa_jax.models.saisa import init_params
from saisa_jax.testing.configs import tiny_config
from saisa_jax.testing.programs import compilations
from saisa_jax.testing.runs import free_port

ROOT = Path(__file__).parents[2]


def prompts(seed: int, count: int) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        tokens = np.zeros(rng.integers(1, 60), np.int32)
        weights, nothing = np.zeros(len(tokens), np.float32), np.zeros(0, np.int32)
        images = tuple(f"{rng.integers(12)}.png" for _ in range(rng.integers(0, 3)))
        made.append(Prompt(Encoded(str(number), tokens, tokens, weights, tokens, nothing, len(tokens)), images))
    return made


@pytest.mark.parametrize(("size", "ways"), [(8, 1), (8, 4), (6, 2)])
def test_every_prompt_is_in_one_batch(size: int, ways: int) -> None:
    asked = prompts(0, 53)
    batches = plan_batches(asked, size, ways)
    assert sorted(n for batch in batches for n in batch if n is not None) == list(range(53))
    assert {len(batch) for batch in batches} == {size}
    assert all(None not in batch for batch in batches[:-1])
    assert batches == plan_batches(asked, size, ways)


@pytest.mark.parametrize("capacity", [6, 8, 30])
def test_a_ring_holds_what_each_batch_needs(capacity: int) -> None:
    """Played through: a slot holds what was encoded into it last."""
    rng = np.random.default_rng(1)
    ways = [[[f"{n}" for n in rng.choice(20, 4, replace=False)] for _ in range(15)] for _ in range(3)]
    at_once = 2
    rings = [simulate(needs, capacity) for needs in ways]
    slots: list[dict[int, str]] = [{} for _ in ways]
    whole = capacity + 2 * at_once
    for batch, calls in enumerate(schedule(rings, at_once)):
        for call in calls:
            for way, (start, stop) in enumerate(call):
                assert stop - start <= at_once
                for number in range(start, stop):
                    slots[way][number % whole] = rings[way].stream[number]
        for way, ring in enumerate(rings):
            for key in ways[way][batch]:
                assert slots[way][ring.places[batch][key] % whole] == key
    if capacity == 30:
        for ring, needs in zip(rings, ways, strict=True):
            assert len(ring.stream) == len({key for keys in needs for key in keys})


@pytest.mark.multi_device
@pytest.mark.parametrize("alignment", ["saisa", "llava"])
def test_a_mesh_answers_what_one_device_answers(alignment: str, tmp_path: Path) -> None:
    config = tiny_config(alignment)
    params = init_params(config.model_for("finetune"), jax.random.key(0))
    save_model(tmp_path / "model", params, config, load_tokenizer("easy_vqa"), {"stage": "finetune"})
    settings, rows = Settings(batch_size=8, limit=20, max_new_tokens=4), []
    for number, mesh in enumerate((None, parallel.make_mesh(MeshConfig(2, 2, 2)))):
        model = saisa_jax.load(tmp_path / "model", mesh=mesh)
        evaluate(model, "easy_vqa", settings, epath.Path(tmp_path / f"{number}"), "m")
        rows.append((tmp_path / f"{number}" / "evaluation" / "easy_vqa.jsonl").read_text())
    assert rows[0] == rows[1] and len(rows[0].splitlines()) == 20
    with compilations() as compiled:
        evaluate(model, "easy_vqa", settings, epath.Path(tmp_path / "again"), "m")
    assert not [name for name in compiled if "_run_" in name]


# What each of two processes does; its number and a port are its arguments.
OF_TWO = """
import sys
import jax
number, port, model, output = int(sys.argv[1]), *sys.argv[2:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)
from etils import epath
import saisa_jax
from saisa_jax import parallel
from saisa_jax.config import MeshConfig
from saisa_jax.evaluation.runner import Settings, evaluate
model = saisa_jax.load(model, mesh=parallel.make_mesh(MeshConfig(2, 1, 1)))
settings = Settings(batch_size=8, limit=20, max_new_tokens=4)
assert (evaluate(model, "easy_vqa", settings, epath.Path(output), "m") is None) == (number == 1)
"""


@pytest.mark.multi_process
def test_two_processes_answer_what_one_answers(tmp_path: Path) -> None:
    config = tiny_config()
    params = init_params(config.model_for("finetune"), jax.random.key(0))
    save_model(tmp_path / "model", params, config, load_tokenizer("easy_vqa"), {"stage": "finetune"})
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    started = []
    for number in (0, 1):
        command = [sys.executable, "-c", OF_TWO, str(number), str(port), str(tmp_path / "model"), str(tmp_path / "two")]
        with (tmp_path / f"log-{number}").open("w") as log:
            started.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0, 0], [(tmp_path / f"log-{number}").read_text() for number in (0, 1)]
    settings = Settings(batch_size=8, limit=20, max_new_tokens=4)
    evaluate(saisa_jax.load(tmp_path / "model"), "easy_vqa", settings, epath.Path(tmp_path / "one"), "m")
    two, one = (tmp_path / name / "evaluation" / "easy_vqa.jsonl" for name in ("two", "one"))
    assert two.read_text() == one.read_text()
