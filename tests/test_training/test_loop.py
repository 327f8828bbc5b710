"""Whole runs on the tiny configuration: two stages, resume to the bit, signals, bad input."""

import dataclasses
import json
import os
import shutil
import signal
import threading

import jax
import numpy as np
import pytest
from etils import epath

from saisa_jax.checkpoints import CheckpointError, LocalCheckpoints, checksums, committed_steps, load_model
from saisa_jax.compilation import COMPILING, name_of
from saisa_jax.config import TRAIN_ALL_BUT_VISION, TRAIN_PROJECTOR, ConfigError, ProfileConfig
from saisa_jax.data.sample import DataError
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.errors import UserError
from saisa_jax.evaluation import command, runner
from saisa_jax.testing.benchmarks import write_llava
from saisa_jax.testing.configs import tiny_config
from saisa_jax.testing.runs import shown_events
from saisa_jax.training import loop
from saisa_jax.training.loop import TrainingError
from saisa_jax.training.optimizer import flatten, unflatten
from saisa_jax.training.start import frozen_params
from saisa_jax.training.tasks import HeldOutTasks, evaluates_tasks


def rows(workdir, stage: str, kind: str = "train") -> list[dict]:
    lines = (workdir / stage / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def losses(workdir, stage: str) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows(workdir, stage)]


def params_of(workdir, stage: str) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten(load_model(str(workdir / stage / "model"))[0]).items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An undisturbed run of both stages."""
    workdir = epath.Path(tmp_path_factory.mktemp("finished"))
    programs = []

    def made(event, seconds, **said):
        if event == COMPILING and name_of(said) == "train step":
            programs.append(threading.current_thread().name)

    jax.monitoring.register_event_duration_secs_listener(made)
    try:
        assert loop.run(tiny_config(), workdir) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(made)
    assert programs == ["compile_0"] * 2  # while weights were read, and not again for the first step
    return workdir


def test_two_stages_leave_models_metrics_and_summaries(finished):
    for stage in ("pretrain", "finetune"):
        assert [step for step, _ in losses(finished, stage)] == [1, 2, 3]
        evaluations = rows(finished, stage, "eval")
        assert [row["step"] for row in evaluations] == [2, 3]
        assert {"id", "question", "answer", "truth"} == set(evaluations[0]["samples"][0])
        summary = json.loads((finished / stage / "summary.json").read_text())
        assert summary["steps"] == 3 and summary["samples"] == 24 and summary["train_flops"] > 0
        goodput = summary["goodput"]
        assert goodput.pop("lost_steps") == goodput["lost_seconds"] == 0
        assert min(goodput[f"{kind}_seconds"] for kind in ("start", "compile", "data", "step", "save", "eval")) > 0
        assert sum(goodput.values()) == pytest.approx(summary["wall_seconds"], abs=0.1)
        assert rows(finished, stage, "goodput")[0]["compile_seconds"] == goodput["compile_seconds"]
        first, *others = rows(finished, stage)
        assert first["process_memory_bytes"] > 0 and "samples_per_second" not in first  # it was compiled
        for row in others:
            per_second = 1 / row["seconds_per_step"]
            assert row["samples_per_second"] == pytest.approx(8 * per_second)
            whole = summary["train_flops"] / 3 / 1e12 * per_second  # with attention in full
            assert 0.5 * whole < row["tflops_per_second"] < whole
            assert 0 < row["attention_legal"] < row["attention_visited"] == 1
            assert row["image_fill"] == 1 and 0 < row["text_fill"] < 1 and 0 <= row["data_wait"] < 1
    shared, per_layer = params_of(finished, "pretrain"), params_of(finished, "finetune")
    assert shared["visual_proj/fc1/kernel"].shape == (32, 32)
    assert per_layer["layers/visual_proj/fc1/kernel"].shape == (2, 32, 32)
    summary = json.loads((finished / "finetune" / "summary.json").read_text())
    assert summary["start"].endswith("pretrain/model")
    assert summary["parameters"] == sum(leaf.size for leaf in per_layer.values())


def test_a_finished_run_is_left_alone(finished):
    before = (finished / "finetune" / "metrics.jsonl").read_text()
    assert loop.run(tiny_config(), finished) == 0
    assert (finished / "finetune" / "metrics.jsonl").read_text() == before


def test_a_stopped_run_goes_on_to_the_bit(finished, tmp_path, monkeypatch):
    """SIGTERM during the second step of stage 1: a checkpoint, then the same losses and parameters as undisturbed.

    The first start is traced, and its trace closed when it is stopped; what it lost is counted.
    """
    workdir, original = epath.Path(tmp_path), loop.parallel.to_device
    calls = []

    def to_device(batch, mesh, rows=None):
        calls.append(None)
        if len(calls) == 3:  # one held-out batch first
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, mesh, rows)

    monkeypatch.setattr(loop.parallel, "to_device", to_device)
    traced = dataclasses.replace(tiny_config(), profile=ProfileConfig((2, 9)))
    assert loop.run(traced, workdir) == signal.SIGTERM
    assert not (workdir / "pretrain" / "model").exists()
    assert [step for step, _ in losses(workdir, "pretrain")] == [1, 2]
    assert list((workdir / "pretrain" / "profile").glob("plugins/profile/*/*.xplane.pb"))
    (stopped,) = rows(workdir, "pretrain", "goodput")
    assert stopped["step"] == 2 and stopped["compile_seconds"] > 0
    with (workdir / "pretrain" / "metrics.jsonl").open("a") as file:  # as if it had been killed two steps later
        file.write(json.dumps({"kind": "train", "step": 4, "seconds": 1000.0}) + "\n")
    monkeypatch.setattr(loop.parallel, "to_device", original)
    assert loop.run(tiny_config(), workdir) == 0
    for stage in ("pretrain", "finetune"):
        assert losses(workdir, stage) == losses(finished, stage)
        ours, theirs = params_of(workdir, stage), params_of(finished, stage)
        assert all(np.array_equal(ours[path], theirs[path]) for path in theirs)
    assert [row["step"] for row in rows(workdir, "pretrain", "goodput")] == [3]  # it counts the first one
    whole = json.loads((workdir / "pretrain" / "summary.json").read_text())["goodput"]
    assert whole["lost_steps"] == 2 and 0 < 1000 - whole["lost_seconds"] < stopped["compile_seconds"] + 100
    assert whole["compile_seconds"] > stopped["compile_seconds"] and whole["start_seconds"] > stopped["start_seconds"]


def test_a_killed_run_goes_on_from_its_host_s_disk_alone(finished, tmp_path, monkeypatch):
    """A checkpoint of every step there, none elsewhere; nothing is frozen, so that its first model is not needed."""
    workdir, save, saved = epath.Path(tmp_path / "run"), LocalCheckpoints.save, []
    original = loop.parallel.to_device
    shutil.copytree(finished / "pretrain" / "model", tmp_path / "model")
    config = dataclasses.replace(tiny_config(), stages=("finetune",), init_from=str(tmp_path / "model"))
    local = {"local_checkpoints": str(tmp_path / "disk"), "local_checkpoint_every": 1, "checkpoint_every": 100}
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, **local))

    def to_device(batch, mesh, rows=None):
        if len(saved) == 2:
            raise RuntimeError("killed")
        return original(batch, mesh, rows)

    monkeypatch.setattr(LocalCheckpoints, "save", lambda *args: saved.append(args[1]) or save(*args))
    monkeypatch.setattr(loop.parallel, "to_device", to_device)
    with pytest.raises(RuntimeError, match="killed"):
        loop.run(config, workdir)
    monkeypatch.setattr(loop.parallel, "to_device", original)
    assert not committed_steps(workdir / "finetune" / "checkpoints") and list((tmp_path / "disk").glob("*/2"))
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    assert loop.run(config, workdir) == 0
    assert losses(workdir, "finetune") == losses(finished, "finetune")
    ours, theirs = params_of(workdir, "finetune"), params_of(finished, "finetune")
    assert all(np.array_equal(ours[path], theirs[path]) for path in theirs)
    assert not list((tmp_path / "disk").iterdir())


def test_of_a_model_only_what_is_frozen_is_read_again(finished, tmp_path):
    params, *_ = load_model(str(finished / "finetune" / "model"))
    frozen = {path: leaf for path, leaf in flatten(params).items() if path.startswith("vision/")}
    shutil.copytree(finished / "finetune" / "model", tmp_path / "model")
    read = frozen_params(str(tmp_path / "model"), unflatten(frozen))
    assert flatten(read).keys() == frozen.keys()
    assert all(np.array_equal(leaf, frozen[path]) for path, leaf in flatten(read).items())
    assert frozen_params(str(tmp_path / "model"), {"other": np.zeros(3)}) is None and frozen_params("gone", {}) == {}


def forty_questions(folder):
    """Benchmarks in LLaVA's layout, and in GQA each question four times: there is something left to stop."""
    gqa = write_llava(folder) / "gqa"
    answers = json.loads((gqa / "data" / "testdev_balanced_questions.json").read_text())
    asked = [json.loads(line) for line in (gqa / "llava_gqa_testdev_balanced.jsonl").read_text().splitlines()]
    more = [row | {"question_id": f"{row['question_id']}/{n}"} for row in asked for n in range(4)]
    answers = {row["question_id"]: answers[row["question_id"].split("/")[0]] for row in more}
    (gqa / "data" / "testdev_balanced_questions.json").write_text(json.dumps(answers))
    (gqa / "llava_gqa_testdev_balanced.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    return folder


def test_benchmarks_while_training(finished, tmp_path, monkeypatch):
    """A signal comes when they are due: put off. One comes while they are answered: stopped, and gone on with. The last
    answers are those of `eval.py` with the finished model, and the parameters those of a run without."""
    data = str(forty_questions(tmp_path / "benchmarks"))
    options = {"eval_tasks": ("gqa", "pope"), "eval_tasks_every": 2, "eval_limit": 40, "eval_data": data}
    options |= {"eval_prompts": "lmms", "eval_every": 0, "tensorboard": True}
    config = tiny_config()
    config = dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, **options),
        evaluation=dataclasses.replace(config.evaluation, batch_size=2, max_new_tokens=2),
    )
    assert evaluates_tasks(config, "finetune") and not evaluates_tasks(config, "pretrain")
    config = dataclasses.replace(config, stages=("finetune",), init_from=str(finished / "pretrain" / "model"))
    workdir, original, calls = epath.Path(tmp_path), loop.parallel.to_device, []

    def to_device(batch, mesh, rows=None):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, mesh, rows)

    monkeypatch.setattr(loop.parallel, "to_device", to_device)
    assert loop.run(config, workdir) == signal.SIGTERM
    assert rows(workdir, "finetune", "eval") == [] and not (workdir / "finetune" / "tasks").exists()
    monkeypatch.setattr(loop.parallel, "to_device", original)

    said, answered = runner._said, []

    def say(*args):
        answered.append(None)
        if len(answered) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return said(*args)

    monkeypatch.setattr(runner, "_said", say)
    assert loop.run(config, workdir) == signal.SIGTERM
    assert rows(workdir, "finetune", "eval") == [] and committed_steps(workdir / "finetune" / "checkpoints") == [2]
    partial = workdir / "finetune" / "tasks" / "2" / "evaluation" / "gqa.partial.jsonl"
    before = partial.read_text().splitlines()[1:]
    assert 0 < len(before) < 40
    assert loop.run(config, workdir) == 0
    assert len(answered) == 2 * (40 + 12)  # none twice
    assert {*before} < {*(partial.parent / "gqa.jsonl").read_text().splitlines()} and not partial.exists()
    evaluations = rows(workdir, "finetune", "eval")
    assert [row["step"] for row in evaluations] == [2, 3] and {"pope", "pope/f1", "gqa"} < evaluations[0].keys()
    shown = shown_events(tmp_path / "finetune" / "tensorboard")
    assert [step for tag, step in shown if tag == "eval/pope"] == [2, 3]
    ours, theirs = params_of(workdir, "finetune"), params_of(finished, "finetune")
    assert all(np.array_equal(ours[path], theirs[path]) for path in theirs)

    model = str(workdir / "finetune" / "model")
    command.run(model, str(workdir), tasks=["gqa", "pope"], data=data, prompts="lmms", limit=40)
    for task in ("gqa", "pope"):
        record = json.loads((workdir / "evaluation" / f"{task}.json").read_text())
        assert evaluations[1][task] == record["accuracy"] and record["prompts"] == "lmms"
        last = workdir / "finetune" / "tasks" / "3" / "evaluation" / f"{task}.jsonl"
        assert last.read_text() == (workdir / "evaluation" / f"{task}.jsonl").read_text()


def test_a_benchmark_that_cannot_be_asked_stops_a_run_before_it_trains_and_not_later(finished, tmp_path, monkeypatch):
    config = tiny_config()
    wrong = {"eval_tasks": ("source",)}
    wrong = dataclasses.replace(config, training=dataclasses.replace(config.training, **wrong))
    wrong = dataclasses.replace(wrong, finetune=dataclasses.replace(wrong.finetune, validation=()))
    with pytest.raises(ConfigError, match=r"source has nothing to ask: the recipe's finetune\.validation is empty"):
        loop.run(wrong, epath.Path(tmp_path))
    (tmp_path / "data").mkdir()
    options = dataclasses.replace(config.training, eval_tasks=("gqa",), eval_data=str(tmp_path / "data"))
    message = r"eval_tasks=gqa cannot be asked in finetune: --data=.*holds no files of gqa: .*--data is --config\."
    with pytest.raises(ConfigError, match=message):
        loop.run(dataclasses.replace(config, training=options), epath.Path(tmp_path))
    options = dataclasses.replace(config.training, eval_tasks=("easy_vqua",))
    with pytest.raises(UserError, match=r"easy_vqua.*did you mean easy_vqa\?"):
        loop.run(dataclasses.replace(config, training=options), epath.Path(tmp_path))
    assert not list(tmp_path.glob("*/checkpoints"))

    def fail(*args):
        raise DataError("the disk is gone")

    options = dataclasses.replace(config.training, eval_tasks=("easy_vqa",))
    tasks = HeldOutTasks(
        dataclasses.replace(config, training=options), "finetune", load_tokenizer("easy_vqa"), None, finished
    )
    monkeypatch.setattr("saisa_jax.training.tasks.runner.evaluate", fail)
    assert tasks({}, 7) == {}


def test_frozen_parts_stay_and_another_recipe_or_other_frozen_weights_are_refused(finished, tmp_path, monkeypatch):
    config = tiny_config()
    config = dataclasses.replace(
        config,
        init_from=str(finished / "pretrain" / "model"),
        pretrain=dataclasses.replace(config.pretrain, groups=TRAIN_PROJECTOR),
        finetune=dataclasses.replace(config.finetune, groups=TRAIN_ALL_BUT_VISION),
        training=dataclasses.replace(config.training, eval_every=0),
    )
    workdir = epath.Path(tmp_path)
    assert loop.run(config, workdir) == 0
    start, first, second = (
        params_of(w, s) for w, s in ((finished, "pretrain"), (workdir, "pretrain"), (workdir, "finetune"))
    )
    as_stored = lambda x: np.asarray(jax.numpy.asarray(x).astype("bfloat16"))  # noqa: E731
    for path, leaf in start.items():
        if path.startswith("visual_proj/"):
            assert not np.array_equal(leaf, first[path]), path
        else:
            assert np.array_equal(as_stored(leaf), first[path]), path
    for path, leaf in second.items():
        if path.startswith("vision/"):
            assert np.array_equal(leaf, first[path]), path
    moved = [path for path, leaf in second.items() if path in first and not np.array_equal(leaf, first[path])]
    assert any(path.startswith("layers/attn") for path in moved) and "embed_tokens/embedding" in moved

    # Another recipe in the same workdir, and other frozen parameters than those of the checkpoint.
    with pytest.raises(ConfigError, match=r"seed=0, now 5. Set it back, or choose another --workdir"):
        loop.run(dataclasses.replace(config, seed=5), workdir)
    assert json.loads((workdir / "config.json").read_text())["seed"] == 0
    (workdir / "finetune" / "model").rmtree()
    (workdir / "pretrain" / "model").rmtree()
    monkeypatch.setattr(loop, "checksums", lambda tree: dict.fromkeys(checksums(tree), 1))
    with pytest.raises(CheckpointError, match=r"frozen parameters of .* are not those .*: embed_tokens/embedding"):
        loop.run(config, workdir)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_samples(tmp_path, monkeypatch):
    config = tiny_config()
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, eval_every=0))
    original = loop.make_train_step

    def make_train_step(*args):
        step = original(*args)

        def broken(state, batch):
            state, metrics = step(state, batch)
            return state, metrics | ({"loss": float("nan"), "skipped": 1.0} if int(state.step) == 2 else {})

        broken.trace = step.trace  # type: ignore[attr-defined]
        return broken

    monkeypatch.setattr(loop, "make_train_step", make_train_step)
    with pytest.raises(TrainingError, match=r"loss is nan at step 2 of pretrain; its batch held easy_vqa/"):
        loop.run(config, epath.Path(tmp_path))
    assert not (tmp_path / "pretrain" / "model").exists()
    assert not [path for path in (tmp_path / "pretrain" / "checkpoints").iterdir() if path.name.isdigit()]


def test_bad_batches_are_skipped_and_written_down_until_there_are_too_many(tmp_path, monkeypatch):
    config, workdir, original = tiny_config(), epath.Path(tmp_path), loop.parallel.to_device
    options = dataclasses.replace(config.training, eval_every=0, on_nan="skip", max_skips=1)
    config = dataclasses.replace(config, stages=("pretrain",), training=options)
    bad = {2, 3}
    calls = []

    def to_device(batch, mesh, rows=None):
        calls.append(None)
        weights = batch["loss_weights"] * (np.inf if len(calls) in bad else 1)
        return original(batch | {"loss_weights": weights.astype(np.float32)}, mesh, rows)

    monkeypatch.setattr(loop.parallel, "to_device", to_device)
    with pytest.raises(TrainingError, match=r"is nan at step 3 .* 2 steps in a row .* --config.training.max_skips=1"):
        loop.run(config, workdir)
    bad.discard(3)
    calls[:] = [None] * 2  # goes on from the checkpoint of step 2
    assert loop.run(config, workdir) == 0
    lines = (workdir / "pretrain" / "skipped.jsonl").read_text().splitlines()
    (skipped,) = map(json.loads, lines)
    assert skipped["step"] == 2 and len(skipped["samples"]) == 8 and skipped["samples"][0].startswith("easy_vqa/")
    assert [step for step, _ in losses(workdir, "pretrain")] == [1, 3]
    assert [row["step"] for row in rows(workdir, "pretrain", "skipped")] == [2]
    # The schedule has made one step less.
    assert [row["lr"] for row in rows(workdir, "pretrain")] == pytest.approx([0.0, 1e-3])  # warm-up, peak


def test_errors_name_their_flag(finished, tmp_path):
    config, workdir = tiny_config(), epath.Path(tmp_path)
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=20))
    with pytest.raises(ConfigError, match=r"--config.model.vocab_size="):
        loop.run(small, workdir)
    # What is wrong with stage 2 is found before stage 1 trains.
    later = dataclasses.replace(config, finetune=dataclasses.replace(config.finetune, template="vicunna"))
    with pytest.raises(DataError, match=r"template='vicunna' .*did you mean vicuna_v1"):
        loop.run(later, workdir)
    odd = dataclasses.replace(config, pretrain=dataclasses.replace(config.pretrain, batch_size=12))
    with pytest.raises(ConfigError, match=r"pretrain.batch_size=12 .* --config.pretrain.batch_size to 16"):
        loop.run(odd, workdir)
    wide = dataclasses.replace(
        config, stages=("finetune",), init_from=str(finished / "pretrain" / "model"),
        model=dataclasses.replace(config.model, mlp_dim=48),
    )  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"down_proj/kernel: shape \(2, 64, 32\) in the checkpoint, \(2, 48, 32\) exp"
    ):
        loop.run(wide, workdir)
    assert not (workdir / "config.json").exists()
