"""Plans of batches, the ring of pictures, and answers over a mesh."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

import saisa_jax
from saisa_jax.checkpoints import save_model
from saisa_jax.config import ConfigError, MeshConfig
from saisa_jax.data.text.conversation import Encoded
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.evaluation import command
from saisa_jax.evaluation.runner import Interrupted, evaluate
from saisa_jax.evaluation.settings import Settings
from saisa_jax.inference.batches import Prompt, plan_batches, schedule, simulate
from saisa_jax.models.saisa import init_params
from saisa_jax.testing.configs import tiny_config
from saisa_jax.testing.programs import compilations
from saisa_jax.testing.runs import environment, free_port

ROOT = Path(__file__).parents[2]
LONG = ("--limit=1500", "--max_new_tokens=48")  # so that there is time to stop it


def prompts(seed: int, count: int) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        tokens = np.zeros(rng.integers(1, 60), np.int32)
        weights, nothing = np.zeros(len(tokens), np.float32), np.zeros(0, np.int32)
        images = tuple(f"{rng.integers(12)}.png" for _ in range(rng.integers(0, 3)))
        made.append(
            Prompt(
                Encoded(str(number), tokens, tokens, weights, tokens, nothing, len(tokens), (1,) * len(images)), images
            )
        )
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


def save_tiny(directory: Path, alignment: str = "saisa") -> Path:
    config = tiny_config(alignment)
    params = init_params(config.model_for("finetune"), jax.random.key(0))
    save_model(directory / "model", params, config, load_tokenizer("easy_vqa"), {"stage": "finetune"})
    return directory / "model"


def write_source(folder: Path, bad: int) -> None:
    """Ten questions about pictures of their own, of which one cannot be read."""
    folder.mkdir()
    samples = []
    for number in range(10):
        Image.new("RGB", (32, 32), (25 * number, 0, 99)).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nwhat color is it?"}, {"from": "gpt", "value": "red"}]
        samples.append({"id": f"{number}", "image": f"{number}.png", "conversations": turns})
    (folder / f"{bad}.png").write_bytes(b"no picture")
    (folder / "data.json").write_text(json.dumps(samples))


@pytest.mark.multi_device
@pytest.mark.parametrize("alignment", ["saisa", "llava"])
def test_a_mesh_answers_what_one_device_answers(alignment: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, alignment)
    settings, rows = Settings(batch_size=8, limit=20, max_new_tokens=4), []
    for number, mesh in enumerate((None, "data=2,fsdp=2,tensor=-1")):
        model = saisa_jax.load(tmp_path / "model", mesh=mesh)
        evaluate(model, "easy_vqa", settings, epath.Path(tmp_path / f"{number}"), "m")
        rows.append((tmp_path / f"{number}" / "evaluation" / "easy_vqa.jsonl").read_text())
    assert rows[0] == rows[1] and len(rows[0].splitlines()) == 20
    with compilations() as compiled:
        evaluate(model, "easy_vqa", settings, epath.Path(tmp_path / "again"), "m")
    assert not [name for name in compiled if "_run_" in name]

    def stopped(stop: command.Stop) -> None:
        evaluate(model, "easy_vqa", settings, epath.Path(tmp_path / "stopped"), "m", stop)

    folder = tmp_path / "stopped" / "evaluation"
    with pytest.raises(Interrupted, match="stopped after 16 of 20 "), command.Stop(several=True) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        stopped(stop)
    kept = (folder / "easy_vqa.partial.jsonl").read_text().splitlines()[1:]
    stopped(command.Stop())  # goes on
    answers = (folder / "easy_vqa.jsonl").read_text()
    assert answers == rows[0] and len({*kept} & {*answers.splitlines()}) == 16


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("fsdp=4,tensor=2", MeshConfig(-1, 4, 2)),
        ("fsdp=-1", MeshConfig(1, -1, 1)),
        ("data=4, dcn=2", MeshConfig(4, 1, 1, 2)),
        ("4", "'4' is none of data=N"),
        ("fdsp=4", "'fdsp=4' is none of"),
        ("fsdp=0", "sizes are positive"),
    ],
)
def test_the_mesh_of_a_flag(text: str, meant: MeshConfig | str) -> None:
    if isinstance(meant, MeshConfig):
        assert MeshConfig.parse(text) == meant
        return
    with pytest.raises(ConfigError, match=meant):
        MeshConfig.parse(text)


def eval_py(count: int, model: Path, output: Path, *flags: str) -> list[subprocess.Popen[bytes]]:
    """So many processes of one device each, which evaluate a model together; they write OUTPUT-NUMBER.log."""
    command = [sys.executable, "eval.py", f"--checkpoint={model}", "--tasks=easy_vqa", f"--output={output}", *flags]
    command += ["--batch_size=8"]
    port, started = free_port(), []
    for number in range(count):
        join = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={number}"]
        with Path(f"{output}-{number}.log").open("w") as log:
            one = [*command, *(join if count > 1 else ())]
            started.append(subprocess.Popen(one, env=environment(), cwd=ROOT, stdout=log, stderr=log))
    return started


def ends(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Exit statuses."""
    try:
        return [process.wait(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.multi_process
def test_two_processes_answer_what_one_answers(tmp_path: Path) -> None:
    """By the command; the pictures of a source, of which one cannot be read."""
    model, pictures = save_tiny(tmp_path), tmp_path / "pictures"
    write_source(pictures, bad=3)
    data = ("--tasks=source", f"--data={pictures / 'data.json'}", f"--images={pictures}", "--max_new_tokens=4")
    codes = ends(eval_py(2, model, tmp_path / "two", *data))
    assert codes == [0, 0], [(tmp_path / f"two-{number}.log").read_text() for number in (0, 1)]
    command.run(str(model), str(tmp_path / "one"), tasks=["source"], data=str(pictures / "data.json"),
                images=str(pictures), batch_size=8, max_new_tokens=4)  # fmt: skip
    two, one = (tmp_path / name / "evaluation" / "source.jsonl" for name in ("two", "one"))
    assert two.read_text() == one.read_text() and two.read_text().count('"error"') == 1
    record = json.loads((tmp_path / "two" / "evaluation" / "source.json").read_text())
    assert record["processes"] == 2 and record["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}


@pytest.mark.slow
@pytest.mark.multi_process
def test_an_evaluation_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """Two, one of which is asked to stop; one, which is killed; then two, and at last four."""
    model, partial = save_tiny(tmp_path), tmp_path / "out" / "evaluation" / "easy_vqa.partial.jsonl"

    def answered(least: int, processes: list[subprocess.Popen[bytes]]) -> None:
        deadline = time.monotonic() + 200
        while not partial.exists() or partial.read_text().count("\n") < least:
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.02)

    started = eval_py(2, model, tmp_path / "out", *LONG)
    answered(50, started)
    started[1].send_signal(signal.SIGTERM)
    assert ends(started) == [128 + signal.SIGTERM] * 2
    assert "The evaluation was stopped after" in Path(f"{tmp_path / 'out'}-0.log").read_text()
    before = partial.read_text().count("\n")

    started = eval_py(1, model, tmp_path / "out", *LONG)
    answered(before + 100, started)
    started[0].kill()
    assert ends(started) == [-signal.SIGKILL]
    before = partial.read_text().count("\n")

    started = eval_py(2, model, tmp_path / "out", *LONG)
    answered(before + 100, started)
    started[0].kill()
    assert ends(started)[1] != 0  # it does not wait for ever

    codes = ends(eval_py(4, model, tmp_path / "out", *LONG))
    assert codes == [0] * 4, Path(f"{tmp_path / 'out'}-0.log").read_text()
    assert ends(eval_py(1, model, tmp_path / "one", *LONG)) == [0]
    several, one = (tmp_path / name / "evaluation" / "easy_vqa.jsonl" for name in ("out", "one"))
    assert several.read_text() == one.read_text() and len(one.read_text().splitlines()) == 1500
