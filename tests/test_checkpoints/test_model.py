"""Finished models: self-contained, whole or absent, and readable anywhere."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saisa_jax.checkpoints import CheckpointError, DamagedError, load_model, save_model, storage
from saisa_jax.checkpoints.checksums import seal, unseal
from saisa_jax.testing.configs import tiny_config

CONFIG = tiny_config()
METADATA = {"stage": "finetune", "steps": 3}


def make_params(value=1.0):
    kernel = jnp.arange(8 * 64 * 64, dtype=jnp.float32).reshape(8, 64, 64) * value
    return {"layers": {"kernel": kernel, "bias": jnp.full((8,), value, jnp.bfloat16)}, "empty": jnp.zeros((0, 4))}


def make_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "red": 2, "blue": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model; copy it before you touch it."""
    directory = tmp_path_factory.mktemp("saved") / "model"
    save_model(directory, make_params(), CONFIG, make_tokenizer(), METADATA)
    return directory


@pytest.fixture
def model(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


def largest_file(directory: Path) -> Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_round_trip(saved):
    params, config, tokenizer, metadata = load_model(saved)
    assert_same(params, make_params())
    assert (config, metadata) == (CONFIG, METADATA)
    assert tokenizer.encode("red blue", add_special_tokens=False) == [2, 3]
    assert tokenizer.eos_token_id == 1
    assert all(leaf.devices() == {jax.devices("cpu")[0]} for leaf in jax.tree.leaves(params))
    document = json.loads((saved / "model.json").read_text())
    assert document["parameters"] == 8 * 64 * 64 + 8
    assert {path.name for path in saved.parent.iterdir()} == {"model"}


def test_without_a_tokenizer(tmp_path):
    save_model(tmp_path / "deep" / "model", make_params(), CONFIG, None, {})
    assert load_model(tmp_path / "deep" / "model")[2] is None


def test_into_another_dtype(saved):
    params, *_ = load_model(saved, dtype="bfloat16")
    assert_same(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params()))
    abstract = jax.eval_shape(lambda: jax.tree.map(lambda x: x.astype(jnp.float32), make_params()))
    params, *_ = load_model(saved, abstract=abstract)
    assert_same(params, jax.tree.map(lambda x: x.astype(jnp.float32), make_params()))


@pytest.mark.multi_device
def test_from_a_mesh_and_onto_one(tmp_path):
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("a",), axis_types=(AxisType.Auto,))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("a",), ()))
    params = make_params()
    shardings = {"layers": {"kernel": rows, "bias": rows}, "empty": everywhere}
    with jax.set_mesh(mesh):
        save_model(tmp_path / "model", jax.device_put(params, shardings), CONFIG, None, {})
        for where in ({}, {"sharding": shardings}, {"sharding": everywhere}):
            loaded, *_ = load_model(tmp_path / "model", **where)
            assert_same(loaded, params)
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings)
        loaded, *_ = load_model(tmp_path / "model", abstract=abstract)
    assert_same(loaded, params)
    assert loaded["layers"]["kernel"].sharding.is_equivalent_to(rows, 3)


def test_a_part_is_read_without_the_rest(tmp_path, monkeypatch):
    """As one of eight hosts does that holds an eighth of a model which was saved on one device."""
    monkeypatch.setattr(storage, "CHUNK_BYTES", 2**14)
    save_model(tmp_path / "model", make_params(), CONFIG, None, METADATA)
    base = f"file://{tmp_path / 'model' / 'params'}"
    kvstore = {"driver": "ocdbt", "base": base, "path": "layers.kernel/"}
    kernel = ts.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()
    assert kernel.shape == (8, 64, 64)

    def bytes_read():
        metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
        return sum(metric["values"][0]["value"] for metric in metrics)

    before = bytes_read()
    part = kernel[:, :8].read().result()
    np.testing.assert_array_equal(part, make_params()["layers"]["kernel"][:, :8])
    assert bytes_read() - before <= 2 * part.nbytes < kernel.size * 4 / 3


def test_replaces_a_model_and_nothing_else(model):
    save_model(model, make_params(2.0), CONFIG, None, {"stage": "other"})
    params, _, tokenizer, metadata = load_model(model)
    assert_same(params, make_params(2.0))
    assert (tokenizer, metadata) == (None, {"stage": "other"})
    assert {path.name for path in model.parent.iterdir()} == {"model"}
    with pytest.raises(CheckpointError, match=r"holds something other than a model \(model\)"):
        save_model(model.parent, make_params(), CONFIG, None, {})


def test_a_failed_save_leaves_what_was(model):
    class Broken:
        def save_pretrained(self, directory):
            raise OSError("no space left")

    with pytest.raises(CheckpointError, match=r"was not saved in .*model: OSError: no space left"):
        save_model(model, make_params(2.0), CONFIG, Broken(), {})
    assert_same(load_model(model)[0], make_params())
    with pytest.raises(CheckpointError):
        save_model(model.parent / "new", make_params(2.0), CONFIG, Broken(), {})
    assert {path.name for path in model.parent.iterdir()} == {"model"}


def test_after_a_kill_between_the_two_renames(model):
    old = model.parent / ".model.old"
    model.rename(old)
    with pytest.raises(CheckpointError, match=r"there is no directory .*\.model\.old: rename it"):
        load_model(model)
    (model.parent / ".model.unfinished").mkdir()
    save_model(model, make_params(3.0), CONFIG, None, {})
    assert {path.name for path in model.parent.iterdir()} == {"model"}
    assert_same(load_model(model)[0], make_params(3.0))


def test_flipped_bytes_of_params(model):
    """Once in each part of the largest data file; Orbax alone gives wrong numbers."""
    file = largest_file(model / "params")
    good = file.read_bytes()
    for part in (3, 5, 9):
        content = bytearray(good)
        content[len(good) * part // 10] ^= 255
        file.write_bytes(content)
        with pytest.raises(
            DamagedError, match=r"other values than were saved: layers/kernel|params of .* cannot be read"
        ):
            load_model(model)
    file.write_bytes(good)
    load_model(model)


def test_truncated_or_missing_params(model):
    file = largest_file(model / "params")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DamagedError, match=r"params of .*model cannot be read"):
        load_model(model)
    shutil.rmtree(model / "params")
    with pytest.raises(DamagedError, match=r"params of .*model cannot be read"):
        load_model(model)


def test_damaged_small_files(model):
    for name in ("model.json", "tokenizer/tokenizer.json"):
        file = model / name
        good = file.read_bytes()
        for bad in (good.replace(b"3", b"4", 1), good[: len(good) // 2], b"\xff" + good[1:]):
            file.write_bytes(bad)
            with pytest.raises(DamagedError, match=f"{name} is damaged"):
                load_model(model)
        file.write_bytes(good)
    (model / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(DamagedError, match=r"tokenizer\.json cannot be read"):
        load_model(model)


def test_configuration(model, caplog):
    file = model / "config.json"
    config = json.loads(file.read_text())
    config["evaluation"]["batch_size"] = 7
    file.write_text(json.dumps(config))
    assert load_model(model)[1].evaluation == dataclasses.replace(CONFIG.evaluation, batch_size=7)
    assert "config.json was changed after the model was saved" in caplog.text
    config["model"]["num_layer"] = 3
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: unknown config key model\.num_layer; did you mean"):
        load_model(model)
    file.write_text(file.read_text()[:-20])
    with pytest.raises(DamagedError, match=r"config\.json is damaged"):
        load_model(model)
    file.unlink()
    with pytest.raises(DamagedError, match=r"config\.json cannot be read"):
        load_model(model)


def test_other_shapes_are_listed(saved):
    abstract = jax.eval_shape(make_params)
    abstract["layers"]["kernel"] = jax.ShapeDtypeStruct((8, 64, 32), jnp.float32)
    abstract["layers"]["scale"] = abstract["layers"].pop("bias")
    with pytest.raises(CheckpointError) as caught:
        load_model(saved, abstract=abstract)
    for line in (
        "layers/scale: missing in the checkpoint",
        "layers/bias: unexpected in the checkpoint",
        "layers/kernel: shape (8, 64, 64) in the checkpoint, (8, 64, 32) expected",
    ):
        assert line in str(caught.value)


def test_not_a_model(model, tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no directory .*nowhere$"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"expected model\.json, .*found model; did you mean .*/model\?"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="found a file"):
        load_model(model / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="found nothing"):
        load_model(tmp_path / "empty")


def test_a_later_format(model, monkeypatch):
    monkeypatch.setattr("saisa_jax.checkpoints.storage.FORMAT", 2)
    with pytest.raises(CheckpointError, match=r"is of format \(1, 'mix32'\), and this version reads \(2, 'mix32'\)"):
        load_model(model)


def test_names_that_lead_out_of_the_directory_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model", {"a": np.zeros(2, np.float32)}, tiny_config(), None, {"stage": "finetune"})
    path = tmp_path / "model" / "model.json"
    for name in ("tokenizer/../../stolen", "/etc/stolen", "tokenizer//x", "tokenizer\\..\\x"):
        document = unseal(json.loads(path.read_text()))
        document["files"][name] = 0
        path.write_text(json.dumps(seal(document)))
        with pytest.raises(DamagedError, match="outside of its directory"):
            load_model(tmp_path / "model")
        del document["files"][name]
        path.write_text(json.dumps(seal(document)))
    assert load_model(tmp_path / "model")[0]["a"].shape == (2,)
