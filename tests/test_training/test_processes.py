"""Runs of several processes on the loopback interface: the same numbers as one process, and one fate for all."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from saisa_jax import parallel
from saisa_jax.checkpoints import load_model, save_model
from saisa_jax.config import Config, ConfigError, DistributedConfig, MeshConfig, from_config_dict
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.evaluation import command
from saisa_jax.models.saisa import init_params
from saisa_jax.testing.benchmarks import write_hub
from saisa_jax.testing.configs import tiny_config
from saisa_jax.testing.runs import environment, free_port
from saisa_jax.training import loop, processes
from saisa_jax.training.optimizer import flatten

ROOT = Path(__file__).parents[2]
STEPS = 4


def settings() -> Config:
    """Stage 1, with an evaluation at its end.

    Some true gradients are 0 (biases of keys); a large eps keeps Adam from making steps of their rounding.
    """
    config = tiny_config()
    optimizer = dataclasses.replace(config.pretrain.optimizer, eps=1e-3)
    pretrain = dataclasses.replace(config.pretrain, steps=STEPS, optimizer=optimizer)
    training = dataclasses.replace(config.training, eval_every=STEPS, eval_samples=0)
    return dataclasses.replace(config, stages=("pretrain",), pretrain=pretrain, training=training)


TINY = (
    f"--config={ROOT / 'saisa_jax/testing/configs.py'}",
    *("--config.stages=pretrain", f"--config.pretrain.steps={STEPS}", "--config.pretrain.optimizer.eps=1e-3"),
    *(f"--config.training.eval_every={STEPS}", "--config.training.eval_samples=0"),
)


def start(
    workdir: Path, count: int, devices: int, mesh: str, *flags: str, recipe: Sequence[str] = TINY
) -> list[subprocess.Popen]:
    """`count` processes of `devices` simulated devices each; `mesh` is data x fsdp x tensor."""
    port = free_port()
    sizes = dict(zip(("data", "fsdp", "tensor"), mesh.split("x"), strict=True))
    common = [
        *(sys.executable, ROOT / "train.py", f"--workdir={workdir}", *recipe, *flags),
        *(f"--config.mesh.{axis}={size}" for axis, size in sizes.items()),
        f"--config.distributed.coordinator=127.0.0.1:{port}",
    ]
    started = []
    for process in range(count):
        one = [f"--config.distributed.num_processes={count}", f"--config.distributed.process_id={process}"]
        log = workdir.parent / f"{workdir.name}-{process}.log"
        with log.open("w") as file:
            started.append(
                subprocess.Popen([*common, *one], env=environment(devices), cwd=ROOT, stdout=file, stderr=file)
            )
    return started


def ends(workdir: Path, started: list[subprocess.Popen], seconds: int = 300) -> tuple[list[int], list[str]]:
    """Exit statuses, and what the processes said."""
    try:
        codes = [process.wait(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    return codes, [(workdir.parent / f"{workdir.name}-{i}.log").read_text() for i in range(len(started))]


def rows(directory: Path, kind: str) -> list[dict]:
    found = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [row for row in found if row["kind"] == kind]


def losses(directory: Path) -> list[float]:
    return [row["loss"] for kind in ("train", "eval") for row in rows(directory, kind)]


def params(workdir: Path) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten(load_model(str(workdir / "pretrain/model"))[0]).items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process, on eight devices."""
    workdir = tmp_path_factory.mktemp("alone")
    assert loop.run(settings(), epath.Path(workdir)) == 0
    return workdir


def assert_same_run(workdir: Path, alone: Path) -> None:
    np.testing.assert_allclose(losses(workdir / "pretrain"), losses(alone / "pretrain"), rtol=0, atol=1e-5)
    for field in ("samples", "loss", "tokens"):
        ours, theirs = ([row.get(field) for row in rows(w / "pretrain", "train")] for w in (workdir, alone))
        assert len(ours) == STEPS and (field == "loss" or ours == theirs)
    expected = params(alone)
    for path, leaf in params(workdir).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=1e-5, err_msg=path)


@pytest.mark.multi_process
def test_four_processes_are_one(alone: Path, tmp_path: Path) -> None:
    """An axis "tensor" that spans two processes, which read the same rows, in two of "fsdp"; saved by the clock."""
    workdir = tmp_path / "four"
    minutes = ("--config.training.checkpoint_every=1000", "--config.training.checkpoint_every_minutes=0.000001")
    codes, said = ends(workdir, start(workdir, 4, 1, "1x2x2", *minutes))
    assert codes == [0] * 4, said[0][-3000:]
    assert [path.name for path in sorted((workdir / "pretrain/checkpoints").iterdir())] == ["2", "4"]  # of 4
    assert_same_run(workdir, alone)
    own = [losses(workdir / "pretrain" / f"process_{i}") for i in (1, 2, 3)]
    assert own == [losses(workdir / "pretrain")] * 3


@pytest.mark.multi_process
def test_a_signal_to_one_stops_all_and_one_process_goes_on(alone: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "two"
    started = start(workdir, 2, 2, "4x1x1", "--config.mesh.dcn=2")
    deadline = time.monotonic() + 200
    while not (workdir / "config.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)
    codes, said = ends(workdir, started)
    assert codes == [128 + signal.SIGTERM] * 2, said[0][-3000:]
    assert "stopped by another process after step" in said[0] and "stopped by SIGTERM after step" in said[1]
    stopped_at = rows(workdir / "pretrain", "train")[-1]["step"]
    assert 0 < stopped_at < STEPS and not (workdir / "pretrain" / "model").exists()
    assert loop.run(settings(), epath.Path(workdir)) == 0
    assert_same_run(workdir, alone)


@pytest.mark.multi_process
@pytest.mark.slow
def test_benchmarks_while_training_are_those_of_the_finished_model(tmp_path: Path) -> None:
    """In two processes; each reads the pictures of its own rows, and the first one writes."""
    data, workdir = str(write_hub(tmp_path / "benchmarks")), tmp_path / "two"
    flags = ["--config.stages=finetune", "--config.finetune.steps=2", "--config.allow_random_init=True"]
    flags += ["--config.training.eval_every=0", "--config.training.eval_tasks=('pope', 'mmstar')"]
    flags += [f"--config.training.eval_data={data}", "--config.training.eval_limit=9"]
    codes, said = ends(workdir, start(workdir, 2, 2, "4x1x1", *flags))
    assert codes == [0, 0], said[0][-3000:]
    command.run(str(workdir / "finetune" / "model"), str(tmp_path), tasks=["pope", "mmstar"], data=data, limit=9)
    for task in ("pope", "mmstar"):
        ours, theirs = (
            folder / "evaluation" / f"{task}.jsonl" for folder in (workdir / "finetune" / "tasks" / "2", tmp_path)
        )
        assert ours.read_text() == theirs.read_text() and len(ours.read_text().splitlines()) == 9
    assert not [row for row in rows(workdir / "finetune" / "process_1", "eval") if "pope" in row]


@pytest.mark.multi_process
@pytest.mark.slow
def test_killed_processes_go_on_from_their_own_disks(tmp_path: Path) -> None:
    """Each from a disk that the other one does not see; nothing was saved where both can read it."""
    workdir = tmp_path / "run"
    flags = ["--config.training.checkpoint_every=1000", "--config.training.local_checkpoint_every=1"]
    flags += ["--config.training.eval_every=0", "--config.pretrain.steps=30"]
    flags += [f"--config.training.local_checkpoints={tmp_path}/disk"]
    started = start(workdir, 2, 1, "1x2x1", *flags)
    held = lambda: [len(list(tmp_path.glob(f"disk/*/*/process-0000{i}/account.json"))) for i in (0, 1)]  # noqa: E731
    deadline = time.monotonic() + 250
    while min(held()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in started:
        process.kill()
    ends(workdir, started)
    assert not list((workdir / "pretrain" / "checkpoints").glob("[0-9]*"))
    before = rows(workdir / "pretrain", "train")
    codes, said = ends(workdir, start(workdir, 2, 1, "1x2x1", *flags))
    assert codes == [0, 0], said[0][-3000:]
    after = rows(workdir / "pretrain", "train")
    assert after[0] == before[0] and [row["step"] for row in after] == list(
        range(1, 31)
    )  # its time is the first start's
    assert not list(tmp_path.glob("disk/*"))


@pytest.mark.multi_process
@pytest.mark.slow
def test_bad_data_of_one_ends_all(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    samples = []
    for n in range(64):
        Image.new("RGB", (32, 32), (n, n, n)).save(tmp_path / "images" / f"{n}.png")
        turns = [{"from": "human", "value": "<image>\nwhat color?"}, {"from": "gpt", "value": "gray"}]
        samples.append({"id": f"s/{n}", "image": f"{n}.png", "conversations": turns})
    (tmp_path / "train.json").write_text(json.dumps(samples))
    good = (tmp_path / "images" / "5.png").read_bytes()
    (tmp_path / "images" / "5.png").write_bytes(b"no image")
    source = f"({{'path': '{tmp_path / 'train.json'}', 'images': '{tmp_path / 'images'}'}},)"
    workdir = tmp_path / "bad"
    flags = [f"--config.pretrain.sources={source}", "--config.training.eval_every=0", "--config.pretrain.steps=20"]
    codes, said = ends(workdir, start(workdir, 2, 1, "2x1x1", *flags))
    assert codes == [1, 1]
    lines = [text.strip().splitlines()[-1] for text in said]
    assert sorted("'s/5'" in line for line in lines) == [False, True], lines
    assert sum("could not read its part of the data" in line for line in lines) == 1, lines
    # What was trained before is kept, and is what an undisturbed run has: both go on once the picture is mended.
    step = rows(workdir / "pretrain", "train")[-1]["step"]
    assert step >= 1 and (workdir / "pretrain" / "checkpoints" / str(step)).is_dir()
    assert all(f"the data of step {step + 1} cannot be read; {step} is saved" in text for text in said)
    (tmp_path / "images" / "5.png").write_bytes(good)
    codes, said = ends(workdir, start(workdir, 2, 1, "2x1x1", *flags))
    assert codes == [0, 0], said[0][-3000:]
    whole = tmp_path / "whole"
    assert ends(whole, start(whole, 2, 1, "2x1x1", *flags))[0] == [0, 0]
    assert losses(workdir / "pretrain") == losses(whole / "pretrain")


@pytest.mark.multi_process
def test_who_waits_alone_says_what_to_do_and_ends(tmp_path: Path) -> None:
    code = (
        "import saisa_jax.training.processes as p; from saisa_jax.config import DistributedConfig; p.HINT_SECONDS = 1; "
        "p.start(DistributedConfig(coordinator='127.0.0.1:{port}', num_processes=3, process_id=1, timeout=3))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code.format(port=free_port())], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "still waiting for the other processes after 1 s: start it on every host" in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "did not come within --config.distributed.timeout=3 s" in last and "process_id=0 to 2" in last


def test_auto_without_a_cluster_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def initialize(**_: object) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ConfigError, match=r"coordinator=auto: coordinator_address .* outside of TPU pods, Slurm"):
        processes.start(DistributedConfig(coordinator="auto"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coordinator": "host"}, r"coordinator='host' should be HOST:PORT of process 0, or auto"),
        ({"coordinator": "host:1"}, r"host:1 needs --config.distributed.num_processes and .process_id"),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": 2}, r"process_id=2 is none of 2 processes"),
        ({"coordinator": "host:99999", "num_processes": 2, "process_id": 0}, r"there is no port 99999"),
        ({"process_id": 1}, r"set --config.distributed.coordinator=HOST:PORT"),
        ({"timeout": 0}, r"timeout=0 must be positive"),
    ],
)
def test_what_is_wrong_with_the_flags(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_config_dict(Config, {"distributed": fields})


@pytest.mark.multi_device
def test_rows_follow_the_mesh() -> None:
    """All eight devices are this process's; of a mesh of some of them it still holds all rows, each once."""
    for sizes in ((8, 1, 1), (2, 2, 2), (1, 1, 8)):
        mesh = parallel.make_mesh(MeshConfig(*sizes))
        assert parallel.own_rows(mesh, 16) == tuple(range(16))
        batch = np.arange(32).reshape(16, 2)
        for placed in (parallel.to_device(batch, mesh), parallel.to_device(batch, mesh, 16)):
            np.testing.assert_array_equal(np.asarray(placed), batch)
            assert placed.sharding.is_equivalent_to(parallel.batch_sharding(mesh), 2)


@pytest.mark.multi_device
def test_one_process_receives_its_own_at_once() -> None:
    sync = processes.ProcessSync(parallel.make_mesh(MeshConfig(8, 1, 1)))
    lost = sync.receive(sync.send(False, np.asarray([[1, 5, 1], [0, 2, 0]], np.int32), 2))
    assert lost == (1, 7, 1, (0.0,)) and not sync.stopping and not sync.saving
    sync.send(True, np.zeros((2, 3), np.int32), 2, save=True)
    assert sync.stopping and sync.saving


def test_an_alarm_rings_once_until_it_is_due_again(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])
    alarm, heard = processes.Alarm(0.5), []
    for now[0] in (10.0, 29.0, 30.0, 31.0, 61.0):
        heard.append(alarm.rings())
    assert heard == [False, False, True, False, True]
    now[0] = 80.0
    alarm.wind()
    now[0] = 100.0
    assert not alarm.rings() and not processes.Alarm(0).rings()


def test_slices_are_part_of_the_data_axis() -> None:
    assert parallel.make_mesh(MeshConfig(-1, 2, 1, dcn=2)).shape == {"data": 4, "fsdp": 2, "tensor": 1}
    with pytest.raises(ConfigError, match=r"mesh.data=3 does not divide by mesh.dcn=2"):
        MeshConfig(3, 1, 1, dcn=2)
    with pytest.raises(ConfigError, match=r"mesh.data=4 does not divide by mesh.dcn=3: set --config.mesh.dcn"):
        parallel.make_mesh(MeshConfig(-1, 2, 1, dcn=3))


def test_gpus_that_slurm_would_leave_idle_are_an_error() -> None:
    processes._check_slurm({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "8"})
    processes._check_slurm({"SLURM_NTASKS_PER_NODE": "1"})
    with pytest.raises(ConfigError, match=r"8 GPUs and 1 tasks: set --ntasks-per-node=8; or, .* name HOST:PORT"):
        processes._check_slurm({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "1"})


@pytest.mark.multi_process
@pytest.mark.slow
def test_projectors_fitted_by_two_processes_are_those_of_one(tmp_path: Path) -> None:
    """And so is the student that they start: each process reads a part of the rows, and the sums are those of all."""
    llava = tiny_config("llava")
    teacher = tmp_path / "teacher"
    tree = init_params(llava.model, jax.random.key(5))
    save_model(epath.Path(teacher), tree, llava, load_tokenizer("easy_vqa"), {"stage": "finetune"})
    recipe = [f"--config={ROOT / 'configs/distill_from_llava.py'}:{teacher}", "--config.finetune.steps=2"]
    recipe += ["--config.finetune.optimizer.eps=1e-3", "--config.training.eval_every=0"]
    trained, fits = {}, {}
    for count, devices in ((1, 4), (2, 2)):
        workdir = tmp_path / f"by-{count}"
        codes, said = ends(workdir, start(workdir, count, devices, "2x2x1", recipe=recipe))
        assert codes == [0] * count, said[0][-3000:]
        trained[count] = flatten(load_model(str(workdir / "finetune/model"))[0])
        fits[count] = re.findall(r"^(?:fitted to \d+|layer \d.*)", said[0], re.MULTILINE)
    for path, leaf in trained[1].items():
        np.testing.assert_allclose(trained[2][path], leaf, rtol=1e-4, atol=1e-5, err_msg=path)
    assert fits[1] == fits[2] and len(fits[1]) == 1 + llava.model.num_layers
