"""Images: as the recorded ones, of every mode, and broken in every way."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from saisa_jax.config import VisionConfig
from saisa_jax.data import images as images_module
from saisa_jax.data import views as views_module
from saisa_jax.data.images import augment, load_image, prepare_image
from saisa_jax.data.sample import DataError
from saisa_jax.data.views import ImageLoader

RECORDED = Path(__file__).parent.parent / "data" / "saisa_tiny" / "expected.safetensors"
MEAN = VisionConfig().image_mean


def _encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parity
@pytest.mark.parametrize("name", ["image_a", "image_b"])
def test_recorded_pixel_values(name: str) -> None:
    recorded = load_file(RECORDED)
    vision = VisionConfig()
    picture = load_image(_encoded(Image.fromarray(recorded[f"{name}.rgb_uint8"])))
    pixels = prepare_image(picture, 56, "pad", MEAN)
    assert pixels.dtype == np.uint8
    values = (pixels.astype(np.float32) / 255 - np.float32(vision.image_mean)) / np.float32(vision.image_std)
    np.testing.assert_allclose(values.transpose(2, 0, 1), recorded[f"{name}.pixel_values"], rtol=0, atol=2e-6)


def test_pad_puts_the_image_in_the_middle() -> None:
    pixels = prepare_image(Image.new("RGB", (8, 4), (255, 0, 0)), 8, "pad", MEAN)
    assert pixels.shape == (8, 8, 3)
    assert (pixels[:2] == (122, 116, 104)).all()
    assert (pixels[6:] == (122, 116, 104)).all()
    assert (pixels[2:6] == (255, 0, 0)).all()


@pytest.mark.parametrize(("size", "columns"), [((30, 10), slice(10, 20)), ((10, 30), slice(0, 10))])
def test_square_cuts_out_the_centre(size, columns) -> None:
    array = np.zeros((size[1], size[0], 3), np.uint8)
    array[..., 0] = np.arange(size[0])
    array[..., 1] = np.arange(size[1])[:, None]
    pixels = prepare_image(Image.fromarray(array), 10, "square", MEAN)
    rows = slice(10, 20) if size[1] == 30 else slice(0, 10)
    np.testing.assert_array_equal(pixels, array[rows, columns])


def test_resize_changes_the_aspect() -> None:
    array = np.zeros((10, 40, 3), np.uint8)
    array[:, 20:] = 200
    pixels = prepare_image(Image.fromarray(array), 20, "resize", MEAN)
    assert pixels.shape == (20, 20, 3)
    assert (pixels[:, :8] == 0).all()
    assert (pixels[:, 12:] == 200).all()


def test_an_image_of_the_right_size_is_left_alone() -> None:
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    for mode in ("pad", "square", "resize"):
        np.testing.assert_array_equal(prepare_image(Image.fromarray(array), 16, mode, MEAN), array)


def test_unknown_mode() -> None:
    with pytest.raises(DataError, match=r"model.vision.image_mode='crop' is not one of pad, square, resize"):
        prepare_image(Image.new("RGB", (4, 4)), 4, "crop", MEAN)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    value = 255 if mode == "1" else 204  # a level of the web palette
    if mode.startswith("I"):
        image = Image.fromarray(np.full((5, 7), value, np.uint16 if mode == "I;16" else np.int32))
    else:
        image = Image.new("RGB", (7, 5), (value,) * 3).convert(mode)
    assert image.mode == mode
    found = np.asarray(load_image(image))
    assert found.shape == (5, 7, 3)
    assert np.abs(found.astype(int) - value).max() <= 2


def test_palette_with_transparency_and_16_bit_files() -> None:
    palette = Image.new("P", (3, 3), 1)
    palette.putpalette([9, 9, 9, 30, 60, 90])
    assert load_image(_encoded(palette, transparency=0)).getpixel((0, 0)) == (30, 60, 90)
    deep = Image.fromarray(np.full((3, 3), 0x34, np.uint16))
    assert load_image(_encoded(deep)).getpixel((0, 0)) == (0x34,) * 3
    assert load_image(_encoded(Image.new("CMYK", (3, 3), (0, 0, 0, 0)), "JPEG")).getpixel((0, 0)) == (255, 255, 255)


RAMP = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(_encoded(Image.fromarray(RAMP.astype(np.uint16))), id="16 bits that hold 8"),
        pytest.param(_encoded(Image.fromarray((RAMP * 16).astype(np.uint16))), id="16 bits that hold 12"),
        pytest.param(_encoded(Image.fromarray((RAMP * 257).astype(np.uint16))), id="16 bits"),
        pytest.param(_encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), id="32 bits that hold 8"),
        pytest.param(_encoded(Image.fromarray(RAMP.astype(np.uint16)), "TIFF"), id="a TIFF of 16 bits"),
    ],
)
def test_deep_grey_is_what_llava_reads(image: bytes) -> None:
    theirs = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))  # as LLaVA's dataset does
    ours = np.asarray(load_image(image))
    np.testing.assert_array_equal(ours, theirs)
    assert len(np.unique(ours)) > 1  # and not one colour


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (Image.fromarray((1000 + RAMP).astype(np.uint16)), True),  # all above 255
        (Image.fromarray((RAMP * 257).astype(np.uint16)), True),  # all but one value
        (Image.merge("LA", [Image.new("L", (16, 16)), Image.fromarray(RAMP.astype(np.uint8))]), True),
        (Image.merge("RGBA", [*[Image.new("L", (16, 16))] * 3, Image.fromarray(RAMP.astype(np.uint8))]), True),
        (Image.fromarray(np.full((16, 16), 1000, np.uint16)), False),  # one value in the file as well
        (Image.fromarray(RAMP.astype(np.uint16)), False),
        (Image.new("RGBA", (16, 16), (9, 9, 9, 9)), False),
    ],
)
def test_a_picture_that_becomes_one_colour_is_told_of(image, told: bool, tmp_path, caplog) -> None:
    path = tmp_path / "its name.png"
    image.save(path)
    with caplog.at_level("WARNING", "absl"):
        load_image(str(path))
    assert ("its name.png becomes one colour" in caplog.text) == told


def _deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a colour, which PIL cannot write; `values` [height, width]."""
    height, width = values.shape
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in values)
    header = np.array([width, height], ">u4").tobytes() + bytes([16, 2, 0, 0, 0])
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    numbers = lambda x: np.array([x], ">u4").tobytes()  # noqa: E731
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        numbers(len(content)) + kind + content + numbers(zlib.crc32(kind + content)) for kind, content in parts
    )


@pytest.mark.parametrize(("scale", "told"), [(1, True), (16, True), (257, False)])
def test_colours_of_16_bits_that_hold_fewer_become_black_as_in_llava(scale: int, told: bool, caplog) -> None:
    image = _deep_png(RAMP * scale)
    with caplog.at_level("WARNING", "absl"):
        ours = np.asarray(load_image(image))
    np.testing.assert_array_equal(ours, np.asarray(Image.open(io.BytesIO(image)).convert("RGB")))
    assert ("becomes black, or nearly" in caplog.text) == told


def test_a_missing_image_names_a_file_like_it(tmp_path) -> None:
    for name in ("pic.gif", "Other.JPG"):
        (tmp_path / name).write_bytes(b"")
    for missing, there in (("pic.jpg", "pic.gif"), ("other.jpg", "Other.JPG")):
        for read in (load_image, images_module.read_image):
            with pytest.raises(DataError, match=rf"sample 's': there is no image .*{missing}; '{there}' is there"):
                read(str(tmp_path / missing), "s")
    (tmp_path / "link.jpg").symlink_to("gone/link.jpg")
    with pytest.raises(DataError, match=r"there is no image .*link.jpg; that is a link to gone/link.jpg, which is not"):
        load_image(str(tmp_path / "link.jpg"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    with pytest.raises(DataError, match=r"images/images/a.jpg; .*/images/a.jpg is there: name the folder above"):
        load_image(str(tmp_path / "images" / "images" / "a.jpg"))
    with pytest.raises(DataError, match=r"there is no image [^;]*$"):
        load_image(str(tmp_path / "none.jpg"))
    with pytest.raises(DataError, match=r"there is no image [^;]*$"):
        load_image(str(tmp_path / "no folder" / "none.jpg"))


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (4, 2), (0, 0, 0))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    upright = load_image(_encoded(image, exif=exif))
    assert upright.size == (2, 4)
    assert upright.getpixel((1, 0)) == (255, 255, 255)


def test_unreadable_exif_does_no_harm() -> None:
    data = _encoded(Image.new("RGB", (4, 4), (1, 2, 3)), exif=b"Exif\x00\x00not a tiff")
    assert load_image(data).getpixel((0, 0)) == (1, 2, 3)


def test_sources_are_paths_bytes_and_images(tmp_path) -> None:
    image = Image.new("RGB", (3, 3), (1, 2, 3))
    path = tmp_path / "a.png"
    image.save(path)
    for source in (path, str(path), path.read_bytes(), image):
        assert load_image(source).getpixel((2, 2)) == (1, 2, 3)


def test_broken_files_name_sample_and_path(tmp_path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        path = tmp_path / f"cut.{kind}"
        whole = _encoded(noise, kind)
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=rf"sample 'a/7': cannot read .*cut\.{kind}"):
            load_image(path, "a/7")
    with pytest.raises(DataError, match=r"sample 'a/7': there is no image .*missing.png"):
        load_image(tmp_path / "missing.png", "a/7")
    with pytest.raises(DataError, match=r"sample 'a/7': cannot read"):
        load_image(tmp_path, "a/7")
    for data in (b"", b"no picture at all", b"%!PS-Adobe-3.0 EPSF-3.0"):
        with pytest.raises(DataError, match=rf"sample 'a/7': cannot read image of {len(data)} bytes"):
            load_image(data, "a/7")
    with pytest.raises(DataError, match=r"floating-point"):
        load_image(_encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))


def test_a_flipped_byte_is_found() -> None:
    data = bytearray(_encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(DataError, match=r"cannot read"):
        load_image(bytes(data))


def test_huge_images_are_refused_before_they_are_decoded(monkeypatch) -> None:
    bomb, worse = _encoded(Image.new("1", (12_000, 12_000))), _png_that_says(60_000, 60_000)
    assert len(bomb) < 100_000
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(DataError, match=r"sample 'a/7': .* has 12000 x 12000 pixels; at most 89,478,485"),
    ):
        load_image(bomb, "a/7")
    with pytest.raises(DataError, match=r"sample 'a/7': .* is too large to decode"):
        load_image(worse, "a/7")


def test_huge_files_are_refused_before_they_are_opened(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(data := _encoded(Image.new("1", (3, 3))))
    monkeypatch.setattr(images_module, "MAX_BYTES", len(data) - 1)
    for source in (data, tmp_path / "a.png", str(tmp_path / "a.png")):
        with pytest.raises(DataError, match=rf"sample 'a/7': .* is a file of {len(data)} bytes; at most"):
            load_image(source, "a/7")


def _png_that_says(width: int, height: int) -> bytes:
    """A tiny file whose header says that it is huge."""
    data = bytearray(_encoded(Image.new("1", (1, 1))))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def test_long_images_do_not_explode_when_padded() -> None:
    with pytest.raises(DataError, match=r"20000 x 1 pixels become 20000 x 20000 when padded"):
        prepare_image(Image.new("RGB", (20_000, 1)), 56, "pad", MEAN, "a/7")
    with pytest.raises(DataError, match=r"1 x 20000 pixels become 336 x 6720000 when resized"):
        prepare_image(Image.new("RGB", (1, 20_000)), 336, "square", MEAN)


def test_the_loader_keeps_what_fits(tmp_path, monkeypatch) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        Image.new("RGB", (4, 4), (i, i, i)).save(path)
    reads: list[str] = []
    real = views_module.load_image
    monkeypatch.setattr(
        views_module, "load_image", lambda source, *rest: reads.append(source.name) or real(source, *rest)
    )
    load = ImageLoader(VisionConfig(image_size=4, patch_size=1), cache_bytes=2 * 4 * 4 * 3)
    for i in (0, 1, 0, 2, 0, 1):  # reading 2 throws out 1, which was not used for longest
        assert (load(paths[i]) == i).all()
    assert reads == ["0.png", "1.png", "2.png", "1.png"]
    assert not load(paths[1]).flags.writeable


# --- Augmentation ----------------------------------------------------------------------------------------------------


def test_augment_is_deterministic_and_moves_things() -> None:
    image = np.full((64, 64, 3), (250, 240, 230), np.uint8)
    image[20:30, 12:40] = (255, 0, 0)
    seen = set()
    for seed in range(64):
        one, two = (augment(image, np.random.default_rng(seed)) for _ in range(2))
        np.testing.assert_array_equal(one, two)
        assert one.shape == image.shape and one.dtype == np.uint8
        red = (one == (255, 0, 0)).all(-1)
        assert red.sum() == 280  # nothing lost, nothing smeared
        assert (one[~red] == (250, 240, 230)).all()
        rows, columns = np.nonzero(red)
        assert (np.ptp(rows), np.ptp(columns)) == (9, 27)
        seen.add((rows.min(), columns.min()))
    assert len(seen) > 30


def test_augment_mirrors_left_to_right_and_never_turns() -> None:
    image = np.zeros((8, 8, 3), np.uint8)  # too small to be moved
    image[0, 1] = 255
    found = {tuple(np.argwhere(augment(image, np.random.default_rng(seed))[..., 0])[0].tolist()) for seed in range(50)}
    assert found == {(0, 1), (0, 6)}


# --- As transformers' own processors on PIL --------------------------------------------------------------------------

SIZES = [(57, 31), (31, 57), (33, 33), (1, 40), (40, 1), (1, 1), (336, 335), (101, 3), (28, 60), (29, 28), (7, 5)]


def _picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def _pixels(processor: Any, image: Image.Image) -> np.ndarray:
    """What a processor makes of an image, before it makes floating-point numbers of it."""
    array = processor(image, do_rescale=False, do_normalize=False, return_tensors="np").pixel_values[0]
    return array.transpose(1, 2, 0)


@pytest.mark.parity
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [28, 27])
def test_square_is_clips_processor(size, side: int) -> None:
    edges = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    processor = CLIPImageProcessorPil(**edges)
    np.testing.assert_array_equal(
        prepare_image(_picture(*size), side, "square", MEAN), _pixels(processor, _picture(*size))
    )


@pytest.mark.parity
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [28, 27])
def test_pad_is_llavas_square_through_clips_processor(size, side: int) -> None:
    """LLaVA puts the image on a square of the mean colour, and hands that to CLIP's processor."""
    image, long = _picture(*size), max(size)
    square = np.empty((long, long, 3), np.uint8)
    square[:] = [int(255 * mean) for mean in MEAN]
    top, left = (long - image.height) // 2, (long - image.width) // 2
    square[top : top + image.height, left : left + image.width] = np.asarray(image)
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    np.testing.assert_array_equal(prepare_image(image, side, "pad", MEAN), _pixels(processor, Image.fromarray(square)))


@pytest.mark.parity
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [28, 27])
def test_resize_is_siglips_processor(size, side: int) -> None:
    processor = SiglipImageProcessorPil(size={"height": side, "width": side})
    np.testing.assert_array_equal(
        prepare_image(_picture(*size), side, "resize", MEAN), _pixels(processor, _picture(*size))
    )
