"""Data sets of TensorFlow Datasets, made and read without TensorFlow."""

from __future__ import annotations

import io
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from saisa_jax.config import SourceConfig
from saisa_jax.data.images import load_image
from saisa_jax.data.sample import DataError
from saisa_jax.data.sources import open_source


class Quiz(tfds.core.GeneratorBasedBuilder):
    """Five pictures with questions; the third has none, the fourth a palette that tfds would not make RGB."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = epath.Path(__file__)  # tfds would look for it with a package that is not there

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="png"),
            "images": tfds.features.Sequence(tfds.features.Image(encoding_format="png")),
            "question": tfds.features.Text(),
            "answers": tfds.features.Sequence(tfds.features.Text()),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            "objects": tfds.features.Sequence({"name": tfds.features.Text(), "count": np.int32}),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(5), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for i in range(count):
            yield (
                i,
                {
                    "image": _png(i, "P" if i == 3 else "RGB"),
                    "images": [_png(i + j) for j in range(i)],
                    "question": f"what is {i} é {{x}}?",
                    "answers": [f"it is {i}", "or not"] if i != 2 else [],
                    "label": i % 2,
                    "objects": [{"name": f"cup {i}", "count": i}] * 2,
                },
            )


def _png(shade: int, mode: str = "RGB") -> io.BytesIO:
    stream = io.BytesIO()
    Image.new("RGB", (4, 3), (51 * shade, 0, 0)).convert(mode).save(stream, "PNG")
    stream.seek(0)
    return stream


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tfds")
    Quiz(data_dir=str(root), file_format="array_record").download_and_prepare()
    return root


def config(prepared: Path, turns: str = "{question} => {answers}", **fields) -> SourceConfig:
    return SourceConfig("tfds", path=str(prepared), **{"name": "quiz", "turns": turns} | fields)


def said(sample) -> list[str]:
    return [turn.text for turn in sample.turns]


def test_features_become_turns(prepared) -> None:
    samples = open_source(config(prepared))
    assert len(samples) == 5
    assert samples[1].id == "quiz/train:1"
    assert said(samples[1]) == ["what is 1 é {x}?", "it is 1"]  # of a list the first entry
    assert said(samples[2]) == ["what is 2 é {x}?", ""]  # the encoder says that it has no answer
    for i in range(5):
        (image,) = samples[i].images
        assert isinstance(image, bytes) and image == _png(i, "P" if i == 3 else "RGB").getvalue()
        assert load_image(image).getpixel((0, 0)) == (51 * i, 0, 0)
    copy = pickle.loads(pickle.dumps(samples))
    assert len(pickle.dumps(samples)) < 500 and [copy[i] for i in range(5)] == [samples[i] for i in range(5)]
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("turns", "fields", "expected"),
    [
        (" => a picture of a {label}", {}, ["", "a picture of a dog"]),
        ("<image> {{}} {objects/count}: => {objects/name}", {}, ["<image>\n{} 1:", "cup 1"]),
        ("{question} <image> => {label}", {"split": "test[1:]"}, ["<image>\nwhat is 1 é {x}?", "dog"]),
        ("{question} => {label}", {"image_feature": ""}, ["what is 1 é {x}?", "dog"]),
        ("{question} => {label}", {"image_feature": "images", "name": "quiz:1.0.0"}, ["what is 1 é {x}?", "dog"]),
    ],
)
def test_templates(prepared, turns, fields, expected) -> None:
    samples = open_source(config(prepared, turns, **fields))
    assert said(samples[0 if "split" in fields else 1]) == expected
    if fields.get("image_feature") == "images":
        assert [len(samples[i].images) for i in range(5)] == [0, 1, 2, 3, 4]
        assert load_image(samples[2].images[1]).getpixel((0, 0)) == (153, 0, 0)


@pytest.mark.parametrize(
    ("turns", "fields", "message"),
    [
        ("{questoin} => {label}", {}, r"sources.turns: 'quiz' has no feature 'questoin'; did you mean question\?"),
        ("{zzz} => {label}", {}, r"no feature 'zzz'; it has .*question"),
        ("{objects} => {label}", {}, r"no feature 'objects'; did you mean objects/"),
        ("{question!r} => {label}", {}, r"braces hold a feature's name and nothing else"),
        ("{question => {label}", {}, r"a brace that is text is written twice"),
        ("{question} => {label}", {"image_feature": "picture"}, r"image_feature: 'quiz' has no feature 'picture'"),
        ("{question} => {label}", {"split": "trian"}, r"sources.split='trian' of 'quiz': .* \(splits: "),
        ("{question} => {label}", {"name": "quizz"}, r"sources.name='quizz' is not prepared in .*download_and_prepare"),
    ],
)  # fmt: skip
def test_what_is_not_there(prepared, turns, fields, message) -> None:
    with pytest.raises(DataError, match=message):
        open_source(config(prepared, turns, **fields))


def test_a_damaged_file_names_the_sample(prepared, tmp_path) -> None:
    shutil.copytree(prepared, tmp_path / "copy")
    (path,) = (tmp_path / "copy").rglob("*train.array_record*")
    data = np.fromfile(path, np.uint8)
    written = np.flatnonzero(data)
    data[written[len(written) // 2]] ^= 0xFF
    data.tofile(path)
    samples = open_source(config(tmp_path / "copy"))
    bad = []
    for i in range(5):
        try:
            samples[i]
        except DataError as error:
            bad.append(str(error))
    assert len(bad) >= 1 and "sample 'quiz/train:" in bad[0] and "cannot be read" in bad[0]


def test_content_is_the_records_and_not_the_place(prepared, tmp_path) -> None:
    shutil.copytree(prepared, tmp_path / "moved")
    first = open_source(config(prepared)).content()
    assert open_source(config(tmp_path / "moved")).content() == first
    assert open_source(config(prepared, split="test")).content() != first
    (file,) = (tmp_path / "moved").rglob("*train*array_record*")
    (other,) = (tmp_path / "moved").rglob("*test*array_record*")
    shutil.copy(other, file)
    assert open_source(config(tmp_path / "moved")).content() != first
