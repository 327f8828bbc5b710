"""Mutated files and samples: every failure is a DataError, nothing hangs, and no process is left behind."""

from __future__ import annotations

import copy
import io
import json
import multiprocessing
import threading
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from saisa_jax.config import SourceConfig, VisionConfig
from saisa_jax.data.sample import DataError
from saisa_jax.data.sources import open_source
from saisa_jax.data.text.encoder import Encoder
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.data.views import ImageLoader
from saisa_jax.testing.configs import tiny_config

VALUES = (
    None,
    True,
    0,
    -1,
    1e308,
    "",
    " ",
    "<image>",
    "</s>",
    "x" * 3000,
    "🙂日本",
    "\ud800",
    "\0",
    "..",
    [],
    {},
    [[]],
)
WORDS = ("human", "gpt", "system", "user", "robot", "<image>", "<image>\n", "USER:", "é", "\u202e", "\ufeff", "\n\n")
KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
NAMES = tuple(f"{kind.lower()}.img" for kind in KINDS)


def base(form: str, name: str) -> dict[str, Any]:
    """A good sample of two questions."""
    said = ("<image>\nwhat is it?", "a red shape", "is it blue?", "no")
    roles = ("human", "gpt") if form == "llava" else ("user", "assistant")
    keys = ("conversations", "from", "value") if form == "llava" else ("messages", "role", "content")
    turns = [{keys[1]: roles[i % 2], keys[2]: text} for i, text in enumerate(said)]
    return {"id": "x", keys[0]: turns} | ({"image": name} if form == "llava" else {"images": [name]})


def mutate(rng: np.random.Generator, value: Any) -> Any:
    """A JSON value with something else in one place of it."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = str(rng.choice(list(value)))
        match rng.integers(5):
            case 0:
                return {name: item for name, item in value.items() if name != key}
            case 1:
                return {**value, "other": value[key]}
        return {**value, key: mutate(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = int(rng.integers(len(value)))
        match rng.integers(6):
            case 0:
                return value[:place] + value[place + 1 :]
            case 1:
                return [*value[:place], value[place], *value[place:]]
            case 2:
                return value[::-1]
            case 3:
                return value * int(rng.integers(2, 40))
        return [*value[:place], mutate(rng, value[place]), *value[place + 1 :]]
    if isinstance(value, str) and rng.random() < 0.6:
        place = int(rng.integers(len(value) + 1))
        return value[:place] + str(rng.choice(WORDS)) * int(rng.integers(1, 4)) + value[place:]
    return copy.deepcopy(VALUES[rng.integers(len(VALUES))])


def damage(rng: np.random.Generator, data: bytes) -> bytes:
    """A file with bytes changed, cut off, left out or put in."""
    if not data:
        return data
    place, count = int(rng.integers(len(data))), int(rng.integers(1, 30))
    noise = rng.integers(0, 256, count, np.uint8).tobytes()
    match rng.integers(5):
        case 0:
            return data[:place]
        case 1:
            return data[:place] + noise + data[place + count :]
        case 2:
            return data[:place] + data[place + count :]
        case 3:
            return data[:place] + noise + data[place:]
    head = int(rng.integers(min(len(data), 64)))  # where the sizes stand
    return data[:head] + noise[:4] + data[head + 4 :]


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    """An encoded picture for each kind of file."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    found = {}
    for kind, name in zip(KINDS, NAMES, strict=True):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, kind)
        found[name] = stream.getvalue()
    return found


def write(rng: np.random.Generator, root: Path, pictures: dict[str, bytes], number: int) -> SourceConfig:
    """A file of two samples, images in a folder or a zip, and one thing wrong with one of them."""
    form, name = str(rng.choice(["llava", "chat"])), str(rng.choice(NAMES))
    good, bad = base(form, name), base(form, name)
    what = rng.choice(["sample", "image", "file", "archive"], p=[0.55, 0.25, 0.1, 0.1])
    files = dict(pictures)
    if what == "sample":
        for _ in range(rng.integers(1, 4)):
            bad = mutate(rng, bad)
    if what == "image":
        files[name] = damage(rng, files[name])
    lines = rng.random() < 0.3
    text = "\n".join(map(json.dumps, (good, bad))) if lines else json.dumps([good, bad], indent=rng.choice([None, 1]))
    data = text.encode()
    path = root / f"{number}.json{'l' if lines else ''}"
    path.write_bytes(damage(rng, data) if what == "file" else data)
    if what != "archive" and rng.random() < 0.7:
        images = root / f"images{number}"
        images.mkdir()
        for its, content in files.items():
            (images / its).write_bytes(content)
    else:
        images = root / f"{number}.zip"
        with zipfile.ZipFile(images, "w", zipfile.ZIP_DEFLATED) as archive:
            for its, content in files.items():
                archive.writestr(its, content)
        if what == "archive":
            images.write_bytes(damage(rng, images.read_bytes()))
    return SourceConfig(form, path=str(path), images=str(images))


@pytest.mark.filterwarnings("ignore")  # PIL warns about what it then raises
@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_failure_is_a_data_error(tmp_path, pictures, count) -> None:
    config, tokenizer = tiny_config(), load_tokenizer("easy_vqa")
    encoder = Encoder(config, "finetune", tokenizer)
    load = ImageLoader(VisionConfig(image_size=16), cache_bytes=0)
    threads, outcome = set(threading.enumerate()), Counter[str]()  # some may be of earlier tests and end meanwhile
    for number in range(count):
        rng = np.random.default_rng(number)
        source = write(rng, tmp_path, pictures, number)
        try:
            samples = open_source(source)
        except DataError as error:
            assert str(tmp_path) in str(error), error  # it names the file
            outcome["file or archive refused"] += 1
            continue
        for i in range(len(samples)):
            try:
                sample = samples[i]
                encoded, _ = encoder(sample)
                for image in sample.images:
                    assert load(image, sample.id).shape == (1, 16, 16, 3)
                assert encoded.loss_weights.any()
                outcome["used"] += 1
            except DataError as error:
                assert error.sample_id, error
                outcome["sample refused"] += 1
    assert outcome["used"] > count / 2 and outcome["sample refused"] > count / 5
    assert outcome["file or archive refused"] > count / 20
    assert not multiprocessing.active_children() and set(threading.enumerate()) <= threads
    print(dict(outcome))
