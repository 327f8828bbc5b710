"""Distillation: the loss, what teacher and student share, whole runs, and what is refused."""

import dataclasses
import functools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from configs import distill_from_llava
from saisa_jax import flops, parallel
from saisa_jax.checkpoints import load_model, read_account, save_model
from saisa_jax.config import (
    PROJECTOR_PATTERN,
    TRAIN_ALL_BUT_VISION,
    Config,
    ConfigError,
    DistillConfig,
    GroupConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    from_config_dict,
)
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.models.saisa import init_params, share_to_per_layer
from saisa_jax.planning import dry_run
from saisa_jax.testing.batches import make_packed_batch, random_layout
from saisa_jax.testing.configs import tiny_config
from saisa_jax.training import loop
from saisa_jax.training.distill import abstract_own, check_teacher
from saisa_jax.training.loss import chunked_distillation, divergence
from saisa_jax.training.optimizer import flatten, unflatten
from saisa_jax.training.setup import setup_stage
from saisa_jax.training.state import create_state
from saisa_jax.training.step import make_train_step

TOKENIZER = load_tokenizer("easy_vqa")
LLAVA = tiny_config("llava")
PROJECTORS = ((PROJECTOR_PATTERN, GroupConfig()), (".*", GroupConfig(frozen=True)))


@functools.cache
def teacher_params():
    """Random, with a projector whose tokens matter."""
    return jax.tree.map(np.asarray, jax.jit(functools.partial(init_params, LLAVA.model))(jax.random.key(5)))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A finished LLaVA."""
    where = epath.Path(tmp_path_factory.mktemp("teacher")) / "model"
    save_model(where, teacher_params(), LLAVA, TOKENIZER, {"stage": "finetune"})
    return where


def config_of(teacher, argument="", **distill):
    """The recipe's, in three steps."""
    config = from_config_dict(Config, distill_from_llava.get_config(f"{teacher}{argument}"))
    finetune = dataclasses.replace(config.finetune, steps=3)
    distill = dataclasses.replace(config.distill, **distill)
    training = dataclasses.replace(config.training, eval_every=0)
    return dataclasses.replace(
        config, finetune=finetune, distill=distill, training=training, evaluation=LLAVA.evaluation
    )


def params_in(directory):
    return {path: np.asarray(leaf) for path, leaf in flatten(load_model(directory)[0]).items()}


# --- The loss ---------------------------------------------------------------------------------------------------------


def test_divergence_and_its_gradient_are_the_formulas():
    rng = np.random.default_rng(0)
    z, taught = (rng.normal(0, 3, (2, 5, 7)).astype(np.float32) for _ in range(2))
    weights = rng.random((2, 5)).astype(np.float32)
    weights[0, 1] = 0
    padded = [np.concatenate([x, np.full((2, 5, 2), -np.inf, np.float32)], axis=-1) for x in (z, taught)]
    t = 2.5
    p, q = (np.exp(x / t) / np.exp(x / t).sum(-1, keepdims=True) for x in (taught.astype(float), z.astype(float)))
    expected = t**2 * np.sum(weights * np.sum(p * np.log(p / q), axis=-1))
    z, taught, weights, *padded = map(jnp.asarray, (z, taught, weights, *padded))
    value, gradient = jax.value_and_grad(divergence)(padded[0], padded[1], weights, t)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient[..., :7], t * weights[..., None] * (q - p), atol=1e-5)
    np.testing.assert_array_equal(gradient[..., 7:], 0)
    assert float(divergence(padded[0], padded[0], weights, t)) == pytest.approx(0, abs=1e-5)
    # In pieces, with gradients to the student alone.
    heads, targets = (lambda x: 2 * x, lambda x: 3 * x), jnp.zeros((2, 5), int)
    whole, pieces = (
        jax.value_and_grad(
            lambda z, taught, chunk=chunk: sum(chunked_distillation(heads, (z, taught), targets, weights, chunk, t)),
            argnums=(0, 1),
        )(z, taught)
        for chunk in (0, 2)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), whole, pieces)
    assert np.abs(whole[1][0]).max() > 0.1
    np.testing.assert_array_equal(whole[1][1], 0)


# --- A step -----------------------------------------------------------------------------------------------------------


def step_of(groups, sizes=(1, 1, 1), **stage):
    """(setup, state before, state after two steps, their metrics, the step) of a student that starts as copies."""
    base = tiny_config()
    finetune = dataclasses.replace(
        base.finetune, groups=groups, optimizer=OptimizerConfig(lr=1e-3, eps=1e-3, warmup_fraction=0.0), **stage
    )
    distill = DistillConfig(teacher="somewhere", weight=0.5, temperature=2.0, start="copy")
    config = dataclasses.replace(
        base, stages=("finetune",), finetune=finetune, distill=distill, mesh=MeshConfig(*sizes)
    )
    setup = setup_stage(config, "finetune", 10, jax.devices()[: int(np.prod(sizes))])
    rng = np.random.default_rng(0)
    rows = [[random_layout(rng, 9 - 2 * i, i % 2 + 1, 100) for i in range(3)] for _ in range(8)]
    batch = make_packed_batch(setup.model, rows)
    make = functools.partial(share_to_per_layer, config=setup.model)
    with parallel.use(setup.mesh, setup.rules):
        first = create_state(make, teacher_params(), groups, setup.optimizer, setup.shardings)
        own = flatten(abstract_own(setup.teacher, first.frozen))
        own = {path: leaf for path, leaf in flatten(teacher_params()).items() if path in own}
        placed = flatten(setup.shardings.teacher)
        own = {path: jax.device_put(leaf, placed[path]) for path, leaf in own.items()}
        first = first._replace(teacher=unflatten(own))
        step = make_train_step(
            setup.model, setup.optimizer, setup.shardings, setup.settings.accumulation, teacher=setup.teacher
        )
        on_mesh, metrics = parallel.to_device(batch, setup.mesh), []
        before = jax.tree.map(np.asarray, first)
        program, state = jax.make_jaxpr(step)(first, on_mesh).jaxpr, first
        for _ in range(2):
            state, found = step(state, on_mesh)
            metrics.append({name: float(value) for name, value in found.items()})
    return setup, before, jax.tree.map(np.asarray, state), metrics, (program, batch)


@pytest.fixture(scope="module")
def alone():
    return step_of(PROJECTORS)


def test_the_teacher_has_its_connector_of_its_own_and_nothing_of_it_changes(alone):
    setup, before, after, metrics, (program, batch) = alone
    assert set(flatten(before.teacher)) == {f"visual_proj/fc{i}/{leaf}" for i in (1, 2) for leaf in ("kernel", "bias")}
    jax.tree.map(np.testing.assert_array_equal, (before.teacher, before.frozen), (after.teacher, after.frozen))
    assert all(
        np.abs(leaf - flatten(before.trainable)[path]).max() > 0 for path, leaf in flatten(after.trainable).items()
    )
    for found in metrics:
        assert found["loss"] == pytest.approx(found["cross_entropy"] + 0.5 * found["kl"], rel=1e-5)
    assert metrics[0]["loss"] > metrics[1]["loss"] and metrics[0]["kl"] > 0
    assert 0 < metrics[0]["attention_legal"] < metrics[0]["attention_visited"] == 1
    # The encoder runs once, and the teacher's forward pass is all that is added.
    text, images = batch["tokens"].shape[1], batch["image_positions"].shape[1]
    of_step = setup.settings.groups, 8, text, images
    needed = flops.training(setup.model, *of_step, setup.teacher)
    assert flops.count(program) == needed.total and needed.teacher.vision == 0 < needed.teacher.mlp
    assert needed.total - needed.teacher.total == flops.train_step(setup.model, *of_step)


@pytest.mark.multi_device
def test_sharded_and_accumulated_is_one_device(alone):
    _, _, expected, losses, _ = alone
    _, _, state, others, _ = step_of(PROJECTORS, (2, 2, 2), accumulation=2)
    for found, other in zip(losses, others, strict=True):
        assert other == pytest.approx(found, rel=1e-4, abs=1e-5)
    for path, leaf in flatten(expected.trainable).items():
        np.testing.assert_allclose(flatten(state.trainable)[path], leaf, atol=1e-5, err_msg=path)


def test_what_trains_the_teacher_holds_twice():
    config = dataclasses.replace(
        tiny_config(), stages=("finetune",), distill=DistillConfig(teacher="somewhere", start="copy")
    )
    paths = {}
    for name, groups, lora in (
        ("all", TRAIN_ALL_BUT_VISION, LoraConfig()),
        ("lora", distill_groups("lora"), LoraConfig(rank=4)),
    ):
        finetune = dataclasses.replace(config.finetune, groups=groups, lora=lora)
        setup = setup_stage(dataclasses.replace(config, finetune=finetune), "finetune", 3)
        paths[name] = set(flatten(setup.abstract_state().teacher))
    assert paths["lora"] == {f"visual_proj/fc{i}/{leaf}" for i in (1, 2) for leaf in ("kernel", "bias")}
    decoder = {path for path in flatten(teacher_params()) if not path.startswith("vision/")}
    assert paths["all"] == decoder
    # A student of another model shares nothing with its teacher.
    other = setup_stage(dataclasses.replace(config, init_from="student"), "finetune", 3).abstract_state()
    assert set(flatten(other.teacher)) == set(flatten(teacher_params()))


def distill_groups(trains):
    return {"lora": ((r".*_lora_[ab]", GroupConfig()), *PROJECTORS)}[trains]


# --- Runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    """A whole run of the recipe: fitted, trained, finished."""
    workdir = epath.Path(tmp_path_factory.mktemp("distilled"))
    assert loop.run(config_of(teacher), workdir) == 0
    return workdir


def test_a_student_is_fitted_trained_and_has_its_teachers_decoder(finished, teacher):
    before, start, after = (params_in(path) for path in (teacher, finished / "start", finished / "finetune" / "model"))
    mine = {path for path in after if "visual_proj" in path}
    assert mine == {f"layers/visual_proj/fc{i}/{leaf}" for i in (1, 2) for leaf in ("kernel", "bias")}
    for path in after.keys() - mine:
        np.testing.assert_array_equal(after[path], before[path], err_msg=path)
        np.testing.assert_array_equal(start[path], before[path], err_msg=path)
    assert all(np.abs(after[path] - start[path]).max() > 0 for path in mine)
    document, account = read_account(finished / "start")
    fit = document["metadata"]["fit"]
    assert account.model.alignment == "saisa" and fit["tokens"] == 3 * 8 * 16 and fit["layers"] == [0, 1]
    # What enters the first layer is the connector's, and a copy is exact; a fit leaves it alone.
    assert fit["copied"][0] == 0 and fit["fitted"][0] < 1e-5 and fit["fitted"][1] < fit["copied"][1]
    np.testing.assert_allclose(start["layers/visual_proj/fc2/kernel"][0], before["visual_proj/fc2/kernel"], atol=1e-6)
    summary = json.loads((finished / "finetune" / "summary.json").read_text())
    assert summary["start"] == str(finished / "start") and summary["alignment"] == "saisa"
    rows = map(json.loads, (finished / "finetune" / "metrics.jsonl").read_text().splitlines())
    assert [row["kl"] > 0 for row in rows if row["kind"] == "train"] == [True] * 3


def test_a_stopped_run_goes_on_to_the_bit(finished, teacher, tmp_path, monkeypatch):
    workdir, original, calls = epath.Path(tmp_path), loop.make_train_step, []

    def make_train_step(*args, **kwargs):
        step = original(*args, **kwargs)

        def counted(state, batch):
            calls.append(None)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(state, batch)

        counted.trace = step.trace
        return counted

    monkeypatch.setattr(loop, "make_train_step", make_train_step)
    config = config_of(teacher)
    assert loop.run(config, workdir) == signal.SIGTERM
    assert not (workdir / "finetune" / "model").exists()
    assert loop.run(config, workdir) == 0
    ours, theirs = params_in(workdir / "finetune" / "model"), params_in(finished / "finetune" / "model")
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(ours[path], leaf, err_msg=path)
    # Not with another teacher.
    other = tmp_path / "other"
    save_model(other, jax.tree.map(lambda x: 2 * x, teacher_params()), LLAVA, TOKENIZER, {})
    with pytest.raises(ConfigError, match=r"distill.teacher=\S+other holds something else than when the run"):
        loop.run(config_of(other), workdir)


def test_a_dry_run_counts_the_teacher(teacher):
    config = config_of(teacher, ",all")
    prepared = setup_stage(config, "finetune", 3)
    table = dry_run.work(prepared)
    assert "teacher" in list(table.columns[0].cells)
    assert "the teacher's own" in list(dry_run.memory(prepared).columns[0].cells)
    own = list(dry_run.parameters(prepared).columns[0].cells)
    assert "teacher/visual_proj/fc1/kernel" in own and "teacher/lm_head/kernel" in own


# --- What is refused --------------------------------------------------------------------------------------------------


def save_changed(directory, config=LLAVA, drop="", metadata=None):
    params = {name: leaf for name, leaf in teacher_params().items() if name != drop}
    save_model(directory, params, config, TOKENIZER, metadata or {})
    return directory


def test_teachers_that_cannot_teach(teacher, tmp_path):
    of_model = lambda **changes: dataclasses.replace(LLAVA.model, **changes)  # noqa: E731
    saisa = tiny_config()
    cases = {
        "is a model of alignment=saisa; a teacher is one of alignment=llava": {"config": saisa},
        "is an LLM without a vision encoder": {"drop": "vision"},
        "has no projector": {"drop": "visual_proj"},
        "was trained blind": {"config": tiny_config("llava", blind=True)},
        "imported without a trained projector": {"metadata": {"imported": {"parts": ["decoder", "vision"]}}},
        "another model than the student, .*: rope_theta is 500.0, and not 10000.0": {
            "config": dataclasses.replace(LLAVA, model=of_model(rope_theta=500.0))
        },
    }
    config = config_of(teacher)
    for number, (message, changes) in enumerate(cases.items()):
        bad = save_changed(tmp_path / str(number), **changes)
        changed = dataclasses.replace(config, distill=dataclasses.replace(config.distill, teacher=str(bad)))
        with pytest.raises(ConfigError, match=rf"--config.distill.teacher=\S+/{number} .*{message}"):
            check_teacher(changed)
    step = dataclasses.replace(config, distill=dataclasses.replace(config.distill, teacher="runs/llava@300"))
    with pytest.raises(ConfigError, match=r"names a step of a run, .* checkpoint export --from=runs/llava@300"):
        check_teacher(step)


def test_configurations_that_cannot_be(teacher):
    config = config_of(teacher)
    shared = dataclasses.replace(config.model.projector, sharing="shared")
    stage = dataclasses.replace(config.finetune, sharing="shared")
    resampler = dataclasses.replace(config.model.projector, kind="resampler", num_tokens=4)
    low_rank = dataclasses.replace(config.model.projector, kind="low_rank", rank=1)
    with_projector = lambda projector: dataclasses.replace(config.model, projector=projector)  # noqa: E731
    for message, changes in (
        ("is for stage 2, and stages=.*: set stages=finetune", {"stages": ("pretrain", "finetune")}),
        ("ridge fits a projector for each layer: .* or distill.start=copy", {
            "model": with_projector(shared), "finetune": stage}),
        ("ridge fits model.projector.kind=mlp and low_rank, not 'resampler'", {"model": with_projector(resampler)}),
        ("set it to 2 at least", {"model": with_projector(low_rank)}),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(config, **changes)
    with pytest.raises(ConfigError, match=r"out of range for model.num_layers=2"):
        dataclasses.replace(config.model, visual_layers=(0, 2))
    with pytest.raises(ConfigError, match=r"distill.temperature=0 must be positive"):
        dataclasses.replace(config.distill, temperature=0)
    with pytest.raises(ConfigError, match=r"distill.start='rigde' is not one of ridge, copy; did you mean ridge"):
        dataclasses.replace(config.distill, start="rigde")
    with pytest.raises(ConfigError, match=r"'everything' is none of projectors, lora, all"):
        distill_from_llava.get_config(f"{teacher},everything")
    copied = dataclasses.replace(config, model=with_projector(shared), finetune=stage, distill=dataclasses.replace(
        config.distill, start="copy"))  # fmt: skip
    assert copied.teacher.within and not dataclasses.replace(copied, init_from="student").teacher.within


def test_a_teacher_that_gives_nan_is_named(teacher, tmp_path):
    params = jax.tree.map(np.copy, teacher_params())
    params["layers"]["mlp"]["down_proj"]["kernel"][0, 0, 0] = np.nan
    broken = tmp_path / "broken"
    save_model(broken, params, LLAVA, TOKENIZER, {})
    with pytest.raises(ConfigError, match=r"distill.teacher=\S+broken gives visual tokens that are not finite: those "
                                          r"that enter layer 1, of a batch that holds easy_vqa"):  # fmt: skip
        loop.run(config_of(broken), epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run" / "start").exists()
