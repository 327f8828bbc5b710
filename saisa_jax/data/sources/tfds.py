"""Data sets of TensorFlow Datasets that were prepared as ArrayRecord files, read without TensorFlow.

`sources.turns` says what both sides say, with the features' names in braces: "{question} => {answer}". Images come as
the encoded bytes that the data set holds, and are decoded as all others are.
"""

from __future__ import annotations

import hashlib
import threading
from typing import Any

from etils import epath

from saisa_jax import buckets
from saisa_jax.config import SourceConfig
from saisa_jax.data.sample import DataError, Sample
from saisa_jax.data.sources import SOURCES
from saisa_jax.data.sources.llava import make_sample
from saisa_jax.data.sources.record_files import records_digest
from saisa_jax.data.sources.turns import TurnsTemplate, as_text, check_name, entries


@SOURCES.register("tfds")
class TfdsSamples:
    """Samples of one split; safe to share among threads. Pickled it is its configuration, and opens again."""

    def __init__(self, config: SourceConfig) -> None:
        """Opens a prepared data set.

        Raises:
          DataError: no such data set or split here, it is not made of ArrayRecord files, or a feature that it lacks.
        """
        self.config = config
        self._lock = threading.Lock()
        builder = _open_builder(config)
        self._features = builder.info.features
        self._template = TurnsTemplate(config.turns, _flatten(self._features), config.name)
        if config.image_feature:
            check_name(config.image_feature, list(self._features), "image_feature", config.name)
        self._data = _open_data(builder, config)
        self._builder = builder

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Sample:
        """Raises DataError with the sample's id if the example cannot be read or says nothing."""
        index = range(len(self))[index]
        sample_id = f"{self.config.name}/{self.config.split}:{index}"
        try:
            with self._lock:  # tfds sets its decoders up anew for every example
                example = self._data[index]
        except Exception as error:  # ArrayRecord and tfds raise almost anything on damaged files
            raise DataError(f"cannot be read: {error}", sample_id) from error
        images = ()
        if self.config.image_feature:
            images = tuple(bytes(item) for item in entries(example[self.config.image_feature]))
        said = self._template(lambda name: _as_text(example, self._features, name))
        return make_sample(sample_id, said, images)

    def content(self) -> str:
        """A hash of the split's records, and of the names that its labels stand for."""
        folder = epath.Path(self._builder.data_path)
        if buckets.is_remote(folder):
            return f"sizes:{_digest([(path.name, path.stat().length) for path in self._files()])}"
        names = sorted(path for path in folder.iterdir() if path.name.endswith(".labels.txt"))
        said = [path.read_text() for path in names]
        return f"records:{_digest([[records_digest(path) for path in self._files()], self.config.split, said])}"

    def _files(self) -> list[epath.Path]:
        return [epath.Path(path) for path in self._builder.info.splits[self.config.split].filepaths]

    def __reduce__(self) -> tuple[type, tuple[SourceConfig]]:
        return type(self), (self.config,)


def _digest(said: object) -> str:
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


def _open_builder(config: SourceConfig) -> Any:
    """A builder from the files alone: the code of a data set may need TensorFlow, and its files do not."""
    from tensorflow_datasets.core import naming, read_only_builder  # a second to import; only this format needs it

    try:
        name, options = naming.parse_builder_name_kwargs(config.name)
        if config.path:
            options["data_dir"] = config.path
        return read_only_builder.builder_from_files(str(name), **options)
    except Exception as error:  # tfds has an error of its own for each way to be wrong
        where = config.path or "tfds's own data_dir"
        hint = f"tfds.builder({config.name!r}, data_dir=..., file_format='array_record').download_and_prepare()"
        raise DataError(f"sources.name={config.name!r} is not prepared in {where}; {hint} prepares it") from error


def _open_data(builder: Any, config: SourceConfig) -> Any:
    import tensorflow_datasets as tfds

    class Encoded(tfds.decode.SkipDecoding):
        """Leaves images encoded, those of a list too."""

        def decode_batch_example_np(self, serialized_example: Any) -> Any:
            return serialized_example

    decoders = {config.image_feature: Encoded()} if config.image_feature else None
    try:
        return builder.as_data_source(split=config.split, decoders=decoders)
    except NotImplementedError as error:
        raise DataError(
            f"sources.name={config.name!r} is prepared as {builder.info.file_format}, which needs TensorFlow; prepare "
            "it with file_format='array_record'"
        ) from error
    except Exception as error:
        known = ", ".join(builder.info.splits)
        raise DataError(f"sources.split={config.split!r} of {config.name!r}: {error} (splits: {known})") from error


def _flatten(features: Any, prefix: str = "") -> list[str]:
    """The names of all features; those within another one are written outer/inner."""
    names: list[str] = []
    for name in features:
        inner = getattr(features[name], "feature", features[name])  # of a list, what it is a list of
        nested = hasattr(inner, "keys")
        names += _flatten(inner, f"{prefix}{name}/") if nested else [f"{prefix}{name}"]
    return names


def _as_text(example: Any, features: Any, name: str) -> str:
    for part in name.split("/"):
        example, features = example[part], getattr(features, "feature", features)[part]
    return as_text(example, getattr(getattr(features, "feature", features), "int2str", None))
