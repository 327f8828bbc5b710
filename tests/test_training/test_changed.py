"""A stopped run goes on with other data, settings or versions of the program: what may change, and what may not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image
from transformers import AutoTokenizer

from saisa_jax.checkpoints import load_model, save_model
from saisa_jax.config import Config, ConfigError, OptimizerConfig, SourceConfig, to_dict
from saisa_jax.data.sample import DataError, SourceChangedError
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.testing.configs import tiny_config
from saisa_jax.training import loop
from saisa_jax.training.optimizer import flatten
from saisa_jax.training.recipe import check_same_contents, check_same_recipe
from saisa_jax.training.start import check_projectors

# --- Settings --------------------------------------------------------------------------------------------------------


def changed(config: Config, path: str, value: Any) -> Config:
    name, _, rest = path.partition(".")
    return dataclasses.replace(config, **{name: changed(getattr(config, name), rest, value) if rest else value})


@pytest.fixture
def workdir(tmp_path: Path) -> epath.Path:
    """Of a run whose stage 1 has a checkpoint."""
    (tmp_path / "pretrain" / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(tiny_config())))
    return epath.Path(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("data.on_error", "drop"),
        ("data.num_threads", 3),
        ("pretrain.accumulation", 2),
        ("model.remat_policy", "full"),
        ("model.attention_impl", "flash"),
        ("finetune.optimizer.lr", 0.5),
        ("finetune.batch_size", 4),
        ("finetune.sources", (SourceConfig("llava", path="other.json"),)),
        ("training.log_every", 7),
    ],
)
def test_what_may_change(workdir, path: str, value: Any, caplog) -> None:
    with caplog.at_level("INFO", "absl"):
        check_same_recipe(changed(tiny_config(), path, value), workdir)
    assert f"{path}" in caplog.text and "goes on with other settings" in caplog.text


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 5),
        ("init_from", "elsewhere"),
        ("data.packing", True),
        ("model.embed_dim", 64),
        ("pretrain.batch_size", 16),
        ("pretrain.optimizer.lr", 0.5),
        ("pretrain.steps", 4),  # of a cosine
        ("pretrain.validation", ()),
        ("pretrain.sources", (SourceConfig("easy_vqa", task="vqa"),)),
    ],
)
def test_what_may_not(workdir, path: str, value: Any) -> None:
    config = tiny_config()
    if path == "data.packing":
        config = changed(config, "data.turns_per_sample", None)
    with pytest.raises(ConfigError, match=rf"another recipe: .*{path}=.*, now .*. Set it back"):
        check_same_recipe(changed(config, path, value), workdir)


def test_a_tokenizer_and_a_model_to_start_from_may_move_and_have_to_be_the_same(workdir, tmp_path) -> None:
    start, words = {"w": np.zeros(3, np.float32)}, load_tokenizer("easy_vqa")
    for name, shift in (("model", 0), ("moved", 0), ("another", 1)):
        params = {path: jax.numpy.asarray(leaf + shift) for path, leaf in start.items()}
        save_model(tmp_path / name, params, tiny_config(), words, {"stage": "pretrain"})
    names = AutoTokenizer.from_pretrained(tmp_path / "another" / "tokenizer")
    names.add_tokens(["a new word"])
    names.save_pretrained(tmp_path / "other_words")
    place = lambda model, words: changed(  # noqa: E731
        changed(tiny_config(), "init_from", str(tmp_path / model)), "data.tokenizer", str(tmp_path / words)
    )

    def check(config: Config) -> None:
        check_same_recipe(config, workdir)
        check_same_contents(config, workdir, load_tokenizer(config.data.tokenizer))

    (workdir / "config.json").write_text(json.dumps(to_dict(place("model", "model/tokenizer"))))
    check(place("model", "model/tokenizer"))  # writes down what they hold
    check(place("moved", "moved/tokenizer"))
    check(place("gone", "moved/tokenizer"))  # stage 2 does not need it
    with pytest.raises(ConfigError, match=r"--config.init_from=.*another holds something else than when the run"):
        check(place("another", "model/tokenizer"))
    with pytest.raises(ConfigError, match=r"--config.data.tokenizer=.*other_words holds something else"):
        check(place("model", "other_words"))


def test_more_steps_where_the_schedule_does_not_depend_on_their_number(workdir) -> None:
    flat = OptimizerConfig(lr=1e-3, schedule="constant", warmup_fraction=0.0)
    config = changed(tiny_config(), "pretrain.optimizer", flat)
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    check_same_recipe(changed(config, "pretrain.steps", 4), workdir)
    for steps in (2, None):
        with pytest.raises(ConfigError, match=r"pretrain.steps=3, now"):
            check_same_recipe(changed(config, "pretrain.steps", steps), workdir)
    (workdir / "pretrain" / "model").mkdir()
    with pytest.raises(ConfigError, match=r"pretrain.steps=3, now 4.*--config.init_from"):
        check_same_recipe(changed(config, "pretrain.steps", 4), workdir)


def test_a_validation_split_may_be_added_and_sources_may_move(workdir) -> None:
    source = SourceConfig("llava", path="a.json", images="a")
    config = changed(changed(tiny_config(), "pretrain.validation", ()), "pretrain.sources", (source,))
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    moved = dataclasses.replace(source, path="b/a.json", images="b")
    check_same_recipe(changed(tiny_config(), "pretrain.sources", (moved,)), workdir)
    with pytest.raises(ConfigError, match=r"pretrain.sources="):
        check_same_recipe(changed(config, "pretrain.sources", (dataclasses.replace(moved, weight=0.5),)), workdir)


def test_a_configuration_that_an_earlier_version_wrote(workdir) -> None:
    raw = json.loads((workdir / "config.json").read_text())
    del raw["allow_random_init"], raw["data"]["max_drop"], raw["model"]["vision"]["family"], raw["profile"]
    for source in (*raw["pretrain"]["sources"], *raw["pretrain"]["validation"]):
        del source["allow_absolute"]
    (workdir / "config.json").write_text(json.dumps(raw))
    check_same_recipe(tiny_config(), workdir)
    with pytest.raises(ConfigError, match=r"seed=0, now 1"):
        check_same_recipe(changed(tiny_config(), "seed", 1), workdir)
    (workdir / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json, the configuration of the run .* cannot be read"):
        check_same_recipe(tiny_config(), workdir)


def test_stage_2_alone_does_not_start_from_random_projectors(tmp_path) -> None:
    config = dataclasses.replace(tiny_config(), stages=("finetune",), allow_random_init=False)
    workdir = epath.Path(tmp_path)
    with pytest.raises(ConfigError, match=r"random projectors: .*--config.init_from=.*--config.allow_random_init=True"):
        check_projectors(config, workdir)
    check_projectors(dataclasses.replace(config, allow_random_init=True), workdir)
    check_projectors(dataclasses.replace(config, stages=("pretrain", "finetune")), workdir)
    (workdir / "pretrain" / "model").mkdir(parents=True)
    check_projectors(config, workdir)


# --- Data ------------------------------------------------------------------------------------------------------------


def write_data(root: Path, samples: int = 24, answer: str = "red") -> None:
    (root / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(samples):
        Image.fromarray(np.full((16, 16, 3), 5 * i, np.uint8)).save(root / "images" / f"{i}.png")
        turns = [("human", "<image>\nis it red?"), ("gpt", answer if i == 20 else "yes")]
        said = [{"from": role, "value": text} for role, text in turns]
        records.append({"id": str(i), "image": f"{i}.png", "conversations": said})
    (root / "data.json").write_text(json.dumps(records))


def on_data(root: Path, **data: Any) -> Config:
    """Stage 2 on packed rows, one sample in each: three steps of eight."""
    config = tiny_config()
    stage = dataclasses.replace(
        config.finetune,
        sources=(SourceConfig("llava", path=str(root / "data.json"), images=str(root / "images")),),
        validation=(), batch_size=8, max_images=1, steps=3,
    )  # fmt: skip
    packed = dataclasses.replace(config.data, packing=True, turns_per_sample=None, **data)
    training = dataclasses.replace(config.training, eval_every=0, checkpoint_every=100)
    return dataclasses.replace(config, stages=("finetune",), data=packed, finetune=stage, training=training)


def params_of(workdir: Path) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten(load_model(str(workdir / "finetune/model"))[0]).items()}


def steps_of(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "finetune" / "checkpoints").iterdir() if path.name.isdigit())


def test_data_that_are_lost_changed_and_moved(tmp_path, monkeypatch) -> None:
    """Pictures vanish: what was trained is saved. Other data are refused; the same ones elsewhere go on to the bit."""
    first, second, whole, workdir = (tmp_path / name for name in ("first", "second", "whole", "run"))
    write_data(first)
    shutil.copytree(first, second)
    assert loop.run(on_data(first), epath.Path(whole)) == 0
    to_device, calls = loop.parallel.to_device, []

    def lose_pictures(*args: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            shutil.rmtree(first / "images")
        return to_device(*args)

    monkeypatch.setattr(loop.parallel, "to_device", lose_pictures)
    with pytest.raises(DataError, match="there is no image"):
        loop.run(on_data(first), epath.Path(workdir))
    assert steps_of(workdir) == [2]
    monkeypatch.setattr(loop.parallel, "to_device", to_device)

    write_data(first, samples=21)
    with pytest.raises(DataError, match=r"have changed since .*: 24 samples, now 21 samples"):
        loop.run(on_data(first), epath.Path(workdir))
    write_data(first, answer="blue")
    with pytest.raises(DataError, match=r"24 samples of content \w+, now as many of \w+"):
        loop.run(on_data(first), epath.Path(workdir))

    raw = json.loads((workdir / "config.json").read_text())
    del raw["data"]["max_drop"], raw["allow_random_init"]  # as an earlier version wrote it
    (workdir / "config.json").write_text(json.dumps(raw))
    assert loop.run(on_data(second, on_error="drop"), epath.Path(workdir)) == 0
    ours, theirs = params_of(workdir), params_of(whole)
    assert all(np.array_equal(ours[path], theirs[path]) for path in theirs)
    assert json.loads((workdir / "finetune" / "summary.json").read_text())["dropped"] == 0


def test_a_file_that_is_written_over_while_it_is_read(tmp_path, monkeypatch) -> None:
    """No sample of it is dropped for that: the run ends with the name of the file, and what was trained is saved."""
    data, workdir = tmp_path / "data", tmp_path / "run"
    write_data(data)
    to_device, calls = loop.parallel.to_device, []

    def write_over(*args: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            write_data(data, answer="blue")
        return to_device(*args)

    monkeypatch.setattr(loop.parallel, "to_device", write_over)
    config = on_data(data, on_error="drop", max_drop=1.0)
    longer = dataclasses.replace(config, finetune=dataclasses.replace(config.finetune, steps=12))
    with pytest.raises(SourceChangedError, match=r"data.json has changed since it was opened; start again"):
        loop.run(longer, epath.Path(workdir))
    (saved,) = steps_of(workdir)
    assert 2 <= saved < 12


def test_samples_that_are_dropped_are_told_of_and_limited(tmp_path, caplog, capfd) -> None:
    data, workdir = tmp_path / "data", tmp_path / "run"
    write_data(data)
    (data / "images" / "7.png").write_bytes(b"no picture")
    with pytest.raises(
        DataError, match=r"1 samples could not be used, more than --config.data.max_drop=0.01 of the 24"
    ):
        loop.run(on_data(data, on_error="drop"), epath.Path(workdir))
    assert steps_of(workdir)[-1] > 0
    with caplog.at_level("WARNING", "absl"):
        assert loop.run(on_data(data, on_error="drop", max_drop=0.1), epath.Path(workdir)) == 0
    summary = json.loads((workdir / "finetune" / "summary.json").read_text())
    assert (summary["samples"], summary["dropped"], summary["left_out"]) == (23, 1, 0)
    assert "1 samples were dropped" in caplog.text and "1 samples dropped" in capfd.readouterr().err
