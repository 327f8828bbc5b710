"""Views of pictures of many sizes: the pixels, number and order of LLaVA-NeXT's; and samples of them in rows."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from saisa_jax.config import Config, ConfigError, SourceConfig, VisionConfig, from_config_dict, to_config_dict
from saisa_jax.data.pipeline import StageData
from saisa_jax.data.prepare import make_job
from saisa_jax.data.rows.counting import count
from saisa_jax.data.rows.reader import Reader
from saisa_jax.data.sample import DataError, Sample, Turn
from saisa_jax.data.text.encoder import Encoder
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.data.views import ImageLoader, best_grid, count_views, num_views, prepare_views
from saisa_jax.planning.lengths import in_slots, known_counts
from saisa_jax.testing.configs import tiny_config

SIZE = 28
VISION = VisionConfig(image_size=SIZE, image_mode="anyres")
TOKENIZER = load_tokenizer("easy_vqa")
P = 16  # visual tokens of a view of the tiny configuration, whose views are of 32 x 32 pixels


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def png(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, options.pop("format", "PNG"), **options)
    return file.getvalue()


def config_of(**data: Any) -> Config:
    config = tiny_config()
    vision = dataclasses.replace(config.model.vision, image_mode="anyres")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vision=vision, max_length=256),
        data=dataclasses.replace(config.data, system_prompt="", turns_per_sample=None, **data),
        finetune=dataclasses.replace(config.finetune, max_images=10, text_length=96),
    )


def sample_of(*images: Any, answer: str = "red", later: str = "") -> Sample:
    turns = [Turn("user", "<image>" * len(images) + "what is it?"), Turn("assistant", answer)]
    turns += [Turn("user", f"{later} is it red?"), Turn("assistant", "no")] if later else []
    return Sample("s", tuple(turns), images)


# --- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grids", [None, ((SIZE, SIZE), (SIZE, 4 * SIZE), (3 * SIZE, 2 * SIZE))])
def test_views_are_those_of_llava_next(grids: Any) -> None:
    vision = dataclasses.replace(VISION, image_grids=grids)
    theirs = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_grid_pinpoints=[list(grid) for grid in vision.grids],
        do_rescale=False,
        do_normalize=False,
    )
    random, numbers = np.random.default_rng(0), set()
    sizes = [(1, 1), (1, 200), (200, 1), (SIZE, SIZE), (2 * SIZE, SIZE), (2 * SIZE + 1, SIZE), (84, 84), (83, 29)]
    for width, height in (*sizes, *random.integers(1, 150, (40, 2)).tolist()):
        image = noise(width, height)
        expected = theirs(image, return_tensors="np").pixel_values[0].transpose(0, 2, 3, 1)
        views = prepare_views(image, vision)
        np.testing.assert_array_equal(views, expected, err_msg=f"{width} x {height}")
        assert views.dtype == np.uint8 and len(views) == num_views(image.size, vision) <= vision.max_views
        numbers.add(len(views))
    assert numbers == ({3, 4, 5} if grids is None else {2, 5, 7})


def test_a_picture_that_is_one_square_is_one_view() -> None:
    vision = dataclasses.replace(VISION, image_mode="pad")
    assert prepare_views(noise(90, 30), vision).shape == (1, SIZE, SIZE, 3)
    assert count_views("nowhere.png", vision) == vision.max_views == 1 and vision.grids == ()


def test_the_number_of_views_is_told_by_the_first_bytes(tmp_path: Path) -> None:
    """As the picture stands upright; a photograph that breaks off is counted all the same."""
    image = noise(120, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = png(image, format="JPEG", exif=exif)
    assert count_views(turned, VISION) == len(ImageLoader(VISION)(turned)) == num_views((40, 120), VISION)
    assert best_grid((40, 120), VISION) == (3 * SIZE, SIZE) and best_grid((120, 40), VISION) == (SIZE, 3 * SIZE)
    broken = png(image, format="JPEG")[:-400]
    assert count_views(broken, VISION) == 4
    with pytest.raises(DataError, match=r"sample 's': cannot read"):
        ImageLoader(VISION)(broken, "s")
    with pytest.raises(DataError, match=r"sample 's': there is no image .*gone.png"):
        count_views(tmp_path / "gone.png", VISION, "s")


# --- samples ---------------------------------------------------------------------------------------------------------


def test_every_view_is_an_image_slot() -> None:
    """Pictures of 4 and 5 views: their tiles stand one behind the other, text goes on behind the last."""
    config = config_of()
    images = [png(noise(100, 30)), png(noise(64, 64))]
    encoded, cut = Encoder(config, "finetune", TOKENIZER)(sample_of(*images))
    first = int(encoded.image_positions[0])
    assert encoded.views == (4, 5) and cut == 0
    np.testing.assert_array_equal(encoded.image_positions, first + P * np.arange(9))
    assert encoded.length == len(encoded.tokens) + 9 * P
    assert encoded.positions[first] == first + 9 * P, "no text stands between views"
    row = Reader(config, "finetune", TOKENIZER, training=True).row(
        [(0, np.random.default_rng(0))], 96, 10, [sample_of(*images)]
    )
    views = np.concatenate([prepare_views(Image.open(io.BytesIO(image)), config.model.vision) for image in images])
    np.testing.assert_array_equal(row.batch["images"][0, :9], views)
    np.testing.assert_array_equal(row.batch["image_segment_ids"][0], [1] * 9 + [0])


def test_truncation_never_halves_a_picture() -> None:
    """Whatever the length: a picture has all its views, or the sample ends before it."""
    config, whole, kept = config_of(), (4, 5), set()
    sample = sample_of(png(noise(100, 30)), later="<image>", answer="red " * 5)
    sample = dataclasses.replace(sample, images=(*sample.images, png(noise(64, 64))))
    for length in range(90, 250, 2):
        short = dataclasses.replace(config, model=dataclasses.replace(config.model, max_length=length))
        encoded, cut = Encoder(short, "finetune", TOKENIZER)(sample)
        assert encoded.views == whole[: len(encoded.views)] and encoded.length <= short.model.max_length
        assert len(encoded.image_positions) == sum(encoded.views)
        assert (cut == 0) == (encoded.length == Encoder(short, "finetune", TOKENIZER).whole(sample).length)
        kept.add(encoded.views)
    assert kept == {(4,), (4, 5)}


def test_counts_are_of_slots(tmp_path: Path) -> None:
    config = config_of()
    paths = [str(tmp_path / f"{n}.png") for n in range(3)]
    for path, size in zip(paths, [(100, 30), (64, 64), (20, 20)], strict=True):
        noise(*size).save(path)
    samples = [sample_of(paths[0]), sample_of(*paths[1:]), sample_of(str(tmp_path / "no"))]
    part = count(samples, Encoder(config, "finetune", TOKENIZER))
    assert part.images[:2].tolist() == [4, sum(num_views(s, config.model.vision) for s in ((64, 64), (20, 20)))]
    assert part.unusable.tolist() == [2] and "there is no image" in part.first[0]


def test_packed_rows_hold_whole_pictures(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    for n in range(12):
        noise(*random.integers(10, 150, 2).tolist(), seed=n).save(tmp_path / f"{n}.png")
    turns = [{"from": "human", "value": "<image>what is it?"}, {"from": "gpt", "value": "red"}]
    samples = [{"id": f"{n}", "image": f"{n}.png", "conversations": turns} for n in range(12)]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    config = config_of(packing=True)
    source = SourceConfig(path=f"{tmp_path}/data.json", images=str(tmp_path))
    config = dataclasses.replace(
        config, finetune=dataclasses.replace(config.finetune, sources=(source,), batch_size=2, text_length=128)
    )
    data = StageData(config, "finetune", TOKENIZER)
    batch, seen = data.batches(), 0
    for _ in range(data.rows.plans.rows_in(1) // 2):
        host = next(batch)
        for row, ids in enumerate(host.sample_ids):
            for segment, name in enumerate(ids, 1):
                held = host.batch["image_segment_ids"][row] == segment
                with Image.open(tmp_path / f"{name}.png") as image:
                    views = prepare_views(image.convert("RGB"), config.model.vision)
                np.testing.assert_array_equal(host.batch["images"][row][held], views)
                places = host.batch["image_positions"][row][held]
                np.testing.assert_array_equal(places, places[0] + P * np.arange(len(views)))
                seen += 1
    assert seen >= 10


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_does_not_fit_names_its_flag() -> None:
    config, big = config_of(), sample_of(png(noise(64, 64)))
    narrow = dataclasses.replace(config, finetune=dataclasses.replace(config.finetune, max_images=4))
    with pytest.raises(
        DataError,
        match=r"1 images of 5 views in a row of 4 slots; raise finetune.max_images, or .* model.vision.image_grids",
    ):
        Encoder(narrow, "finetune", TOKENIZER)(big)
    tight = dataclasses.replace(config, model=dataclasses.replace(config.model, max_length=82))
    with pytest.raises(DataError, match=r"1 image\(s\) of 5 views when cut .* and model.max_length=82; raise"):
        Encoder(tight, "finetune", TOKENIZER)(big)
    with pytest.raises(ConfigError, match=r"up to 5 x 16 positions, .* in model.max_length=80: raise it"):
        dataclasses.replace(config.model, max_length=80)
    with pytest.raises(ConfigError, match=r"data.augment mirrors .*set data.augment=False"):
        config_of(augment=True)
    with pytest.raises(DataError, match=r"--image_size=40 .* leave --image_size out"):
        make_job(config, "nowhere", image_size=40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_grids": ((SIZE, 40),)}, r"\[\(28, 40\)\] are no \(height, width\) in multiples of .*image_size=28"),
        ({"image_grids": ((0, SIZE),)}, r"\[\(0, 28\)\] are no"),
        ({"image_grids": ()}, r"model.vision.image_grids is empty"),
        ({"image_grids": ((SIZE, SIZE),), "image_mode": "pad"}, r"a choice of .*image_mode=anyres, not of 'pad'"),
    ],
)  # fmt: skip
def test_grids_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(VISION, **changes)


def test_grids_as_a_flag() -> None:
    config: Any = to_config_dict(tiny_config())
    config.model.vision.image_mode = "anyres"
    config.model.vision.image_grids = ((32, 64), (64, 32))
    read = from_config_dict(Config, config)
    assert read.model.vision.grids == ((32, 64), (64, 32)) and read.model.vision.max_views == 3
    assert from_config_dict(Config, to_config_dict(read)) == read


# --- planning --------------------------------------------------------------------------------------------------------


def test_stand_ins_take_the_slots_of_a_photograph() -> None:
    source = (SourceConfig(path="llava_v1_5_mix665k.json"),)
    stage = dataclasses.replace(config_of().finetune, sources=source)
    vision = VisionConfig(image_mode="anyres")
    counts = known_counts(stage, vision)
    assert counts is not None and set(np.unique(counts[1])) == {0, 5}, "640 x 480 lies on 672 x 672"
    one = counts[0][:2], np.ones(2, np.int32)
    assert [in_slots(one, v)[1].tolist() for v in (vision, VisionConfig())] == [[5, 5], [1, 1]]
    with pytest.raises(DataError, match=r"max_images=4 has no room for .* 5 views: raise"):
        known_counts(dataclasses.replace(stage, max_images=4), vision)
