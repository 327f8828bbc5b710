"""Features in place of images: prepared once, trained on as on the images themselves, and never another encoder's."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from configs import distill_from_llava
from saisa_jax import flops
from saisa_jax.__main__ import main
from saisa_jax.checkpoints import load_model, read_account, save_model
from saisa_jax.config import (
    PROJECTOR_PATTERN,
    TRAIN_ALL,
    Config,
    ConfigError,
    GroupConfig,
    SourceConfig,
    from_config_dict,
    to_dict,
)
from saisa_jax.data.images import load_image
from saisa_jax.data.pipeline import StageData
from saisa_jax.data.sample import DataError
from saisa_jax.data.sources import open_source
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.inference.features import FeatureEncoder
from saisa_jax.models.saisa import Saisa, init_params
from saisa_jax.testing.configs import tiny_config
from saisa_jax.training import loop
from saisa_jax.training.optimizer import flatten
from saisa_jax.training.start import check_stages

TOKENIZER = load_tokenizer("easy_vqa")
SAMPLES = 20
# As they were when the features were made: the recipes keep frozen weights in bfloat16.
GROUPS = ((PROJECTOR_PATTERN, GroupConfig()), (r".*", GroupConfig(frozen=True, dtype="float32")))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A LLaVA file of 20 samples, one without a picture and one with two; a model to start from; and the features."""
    root = tmp_path_factory.mktemp("home")
    (root / "images").mkdir()
    random, records = np.random.default_rng(0), []
    for i in range(SAMPLES):
        names = [f"{i}-{n}.png" for n in range({5: 0, 9: 2}.get(i, 1))]
        for name in names:
            Image.fromarray(random.integers(0, 256, (30 + i, 40, 3), np.uint8)).save(root / "images" / name)
        question = "<image>" * len(names) + "what color is the shape?"
        records.append({"id": f"s{i}", "image": names, "conversations": [
            {"from": "human", "value": question}, {"from": "gpt", "value": "red" if i % 2 else "blue"}]})  # fmt: skip
        if not names:
            del records[-1]["image"]
    (root / "train.json").write_text(json.dumps(records))
    config = recipe(root)
    save_model(root / "start", init_params(config.model, jax.random.key(1)), config, TOKENIZER, {})
    flags = [
        "--config=saisa_jax/testing/configs.py", f"--config.init_from={root}/start",
        f"--config.finetune.sources=({{'path': '{root}/train.json', 'images': '{root}/images'}},)",
        "--config.model.projector.sharing=shared", "--config.finetune.sharing=shared",
    ]  # fmt: skip
    assert (
        main(["data", "prepare", *flags, f"--output={root}/features", "--features", "--shards=3", "--batch_size=4"])
        == 0
    )
    return root


def recipe(root, **data):
    """Stage 2 alone, from a model that has one projector, on packed rows of what lies there."""
    config = tiny_config("saisa")
    shared = dataclasses.replace(config.model.projector, sharing="shared")
    sources = (SourceConfig(path=f"{root}/train.json", images=f"{root}/images"),)
    if data.get("features"):
        sources = (SourceConfig("arrayrecord", path=f"{root}/features"),)
    finetune = dataclasses.replace(
        config.finetune, sources=sources, validation=sources, sharing="shared", groups=GROUPS, text_length=96,
        max_images=4,
    )  # fmt: skip
    return dataclasses.replace(
        config,
        stages=("finetune",),
        init_from=f"{root}/start",
        model=dataclasses.replace(config.model, projector=shared),
        data=dataclasses.replace(config.data, packing=True, turns_per_sample=None, **data),
        finetune=finetune,
    )


def test_a_set_holds_what_the_encoder_makes_of_each_image(home):
    prepared = open_source(SourceConfig("arrayrecord", path=f"{home}/features"))
    images = open_source(recipe(home).finetune.sources[0])
    assert [len(prepared[i].images) for i in range(SAMPLES)] == [len(images[i].images) for i in range(SAMPLES)]
    config = recipe(home)
    params = load_model(home / "start")[0]
    for i in (0, 9, 19):
        with_images = StageData(config, "finetune", TOKENIZER).rows.reader
        pixels = np.concatenate([with_images.load(image) for image in images[i].images])
        expected = Saisa(config.model).apply({"params": params}, pixels[None], method=Saisa.encode_images)
        found = np.concatenate(prepared[i].images)
        np.testing.assert_allclose(found.reshape(expected[0].shape), expected[0], atol=1e-5)
    assert prepared[0].turns == images[0].turns and prepared[5].images == ()


def test_training_on_features_is_training_on_the_images(home, tmp_path):
    trained = {}
    for name in ("images", "features"):
        assert loop.run(recipe(home, features=name == "features"), epath.Path(tmp_path / name)) == 0
        trained[name] = flatten(load_model(tmp_path / name / "finetune" / "model")[0])
        lines = (tmp_path / name / "finetune" / "metrics.jsonl").read_text().splitlines()
        trained[name] |= {f"row {i}": row["loss"] for i, row in enumerate(map(json.loads, lines)) if "loss" in row}
    assert trained["images"].keys() == trained["features"].keys() and "row 3" in trained["images"]
    for path, value in trained["images"].items():
        np.testing.assert_allclose(trained["features"][path], value, rtol=2e-4, atol=2e-5, err_msg=path)


def test_an_encoder_that_does_not_run_costs_nothing(home):
    sizes = GROUPS, 8, 96, 4
    images, features = (
        flops.training(recipe(home, features=on).trained_model("finetune"), *sizes) for on in (False, True)
    )
    assert images.forward.vision > 0 == features.forward.vision
    assert dataclasses.replace(images.forward, vision=0) == features.forward and images.backward == features.backward


def test_features_of_every_view(home, tmp_path):
    """Any resolution: rows of features hold what the encoder makes of the views that rows of images hold."""

    def cut(config):
        vision = dataclasses.replace(config.model.vision, image_mode="anyres")
        model = dataclasses.replace(config.model, vision=vision, max_length=256)
        return dataclasses.replace(config, model=model, finetune=dataclasses.replace(config.finetune, max_images=10))

    source = recipe(home).finetune.sources[0]
    flags = [
        "--config=saisa_jax/testing/configs.py", f"--config.init_from={home}/start",
        f"--config.finetune.sources=({{'path': '{source.path}', 'images': '{source.images}'}},)",
        "--config.model.projector.sharing=shared", "--config.finetune.sharing=shared",
        "--config.model.vision.image_mode=anyres", "--config.model.max_length=256",
    ]  # fmt: skip
    prepare = ["data", "prepare", *flags, f"--output={tmp_path}/features", "--features", "--shards=1", "--batch_size=4"]
    assert main(prepare) == 0
    of_images, of_features = cut(recipe(home)), cut(recipe(tmp_path, features=True))
    assert (
        StageData(of_features, "finetune", TOKENIZER).mark["counts"]
        == StageData(of_images, "finetune", TOKENIZER).mark["counts"]
    )
    pixels, features = (next(StageData(c, "finetune", TOKENIZER).batches()) for c in (of_images, of_features))
    assert pixels.sample_ids == features.sample_ids
    places = pixels.batch["image_segment_ids"], features.batch["image_segment_ids"]
    np.testing.assert_array_equal(*places)
    assert len({int(n) for n in (places[0] > 0).sum(axis=1)}) > 1
    params = load_model(home / "start")[0]
    expected = Saisa(of_images.model).apply({"params": params}, pixels.batch["images"], method=Saisa.encode_images)
    found = features.batch["images"].reshape(expected.shape)
    held = np.repeat(places[0] > 0, 16, axis=1)
    np.testing.assert_allclose(found[held], expected[held], atol=1e-5)


def student(home, teacher, params):
    """The recipe of distillation, on features; the teacher is saved first."""
    as_llava = tiny_config("llava")
    save_model(teacher, params, as_llava, TOKENIZER, {"stage": "finetune"})
    config = from_config_dict(Config, distill_from_llava.get_config(str(teacher)))
    data, sources = recipe(home, features=True).data, recipe(home, features=True).finetune.sources
    finetune = dataclasses.replace(
        config.finetune, sources=sources, validation=(), text_length=96, max_images=4, steps=2
    )
    return dataclasses.replace(config, finetune=finetune, data=data, evaluation=as_llava.evaluation)


def test_features_of_the_teachers_encoder_before_there_is_a_student(home, tmp_path):
    params = load_model(home / "start")[0]
    config = student(home, tmp_path / "teacher", params)
    assert config.distill.start == "ridge" and not config.init_from
    check_stages(config, TOKENIZER, epath.Path(tmp_path / "run"))
    token = params["vision"]["class_embedding"] + 1
    config = student(home, tmp_path / "other", {**params, "vision": {**params["vision"], "class_embedding": token}})
    with pytest.raises(DataError, match=r"of another encoder"):
        check_stages(config, TOKENIZER, epath.Path(tmp_path / "run"))


@pytest.mark.slow
def test_a_student_is_fitted_and_trained_on_features(home, tmp_path):
    config = student(home, tmp_path / "teacher", load_model(home / "start")[0])
    assert loop.run(config, epath.Path(tmp_path / "run")) == 0
    fit = read_account(tmp_path / "run" / "start")[0]["metadata"]["fit"]
    assert fit["tokens"] > 0 and fit["fitted"][1] < fit["copied"][1]


def test_what_does_not_fit_is_refused(home, tmp_path):
    def check(config):
        check_stages(config, TOKENIZER, epath.Path(tmp_path))

    good = recipe(home, features=True)
    check(good)
    with pytest.raises(DataError, match=r"holds images, and --config.data.features=True"):
        check(dataclasses.replace(good, finetune=recipe(home).finetune))
    with pytest.raises(DataError, match=r"holds features in place of images: set --config.data.features=True"):
        check(dataclasses.replace(recipe(home), finetune=good.finetune))
    with pytest.raises(ConfigError, match=r"train the vision encoder .*freeze"):
        check(dataclasses.replace(good, finetune=dataclasses.replace(good.finetune, groups=TRAIN_ALL)))
    with pytest.raises(ConfigError, match=r"name a model that holds it with --config.init_from"):
        check(dataclasses.replace(good, init_from=""))
    with pytest.raises(ConfigError, match=r"data.augment changes images"):
        recipe(home, features=True, augment=True)
    with pytest.raises(DataError, match=r"features of an image are here"):
        load_image(open_source(good.finetune.sources[0])[0].images[0])

    other = init_params(good.model, jax.random.key(2))
    save_model(tmp_path / "other", other, good, TOKENIZER, {})
    with pytest.raises(DataError, match=r"of another encoder: its weights or --config.model.vision differ"):
        check(dataclasses.replace(good, init_from=f"{tmp_path}/other"))
    half = dataclasses.replace(good, model=dataclasses.replace(good.model, dtype="bfloat16"))
    with pytest.raises(DataError, match=r"of \(16, 32\) float32, and this run's are of \(16, 32\) bfloat16"):
        check(half)
    assert FeatureEncoder(half, f"{home}/start", 3)([np.zeros((32, 32, 3), np.uint8)]).dtype == "bfloat16"
    assert not to_dict(good)["model"]["vision"]["precomputed"]
