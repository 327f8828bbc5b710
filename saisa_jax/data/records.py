"""What `data prepare` makes of samples: the encoded files of their images, or the images' features."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from saisa_jax.config import VisionConfig
from saisa_jax.data.images import load_image, read_image
from saisa_jax.data.sample import DataError, Sample, Samples
from saisa_jax.data.text.conversation import Encoded
from saisa_jax.data.text.encoder import Encoder
from saisa_jax.data.views import prepare_views

T = TypeVar("T")


class Prepared(NamedTuple):
    """One sample that can be trained on."""

    sample: Sample
    encoded: Encoded  # in full length
    images: list[bytes]  # what its record holds of them


class Decoded(NamedTuple):
    """One sample whose images are yet to be encoded."""

    sample: Sample
    encoded: Encoded
    images: list[UInt8[np.ndarray, "views size size 3"]]


@runtime_checkable
class Encode(Protocol):
    """Makes features [I, P, C] of at most `batch_size` images, followed by padding, without waiting for them."""

    batch_size: int

    def __call__(self, images: Sequence[UInt8[np.ndarray, "height width 3"]], /) -> Any: ...


def with_files(
    samples: Samples, encoder: Encoder, vision: VisionConfig, image_size: int | None, numbers: range
) -> Iterator[Prepared | DataError]:
    """Samples with the encoded files of their images, of which each is decoded once; or why one cannot be used.

    Args:
      samples: of the sources.
      encoder: of the stage.
      vision: how images are made square.
      image_size: larger images are made smaller; None: they stay as they are.
      numbers: which samples.
    """

    def read(number: int) -> Prepared:
        sample = samples[number]
        encoded = encoder.whole(sample)
        files = [read_image(image, sample.id) for image in sample.images]
        for place, data in enumerate(files):
            image = load_image(data, sample.id)
            if image_size is not None:
                files[place] = shrunk(image, data, image_size, vision.image_mode)
        return Prepared(sample, encoded, files)

    return (_or_error(read, number) for number in numbers)


def with_features(
    samples: Samples,
    encoder: Encoder,
    vision: VisionConfig,
    encode: Encode,
    readers: ThreadPoolExecutor,
    numbers: range,
) -> Iterator[Prepared | DataError]:
    """Samples with the features of their images; or why one cannot be used. While some images are encoded, those of the
    next samples are read.

    Args:
      samples, encoder, vision, numbers: as for `with_files`.
      encode: the vision encoder.
      readers: threads that read.
    """

    def read(number: int) -> Decoded:
        sample = samples[number]
        encoded = encoder.whole(sample)
        images = [load_image(image, sample.id) for image in sample.images]
        return Decoded(sample, encoded, [prepare_views(image, vision, sample.id) for image in images])

    size = encode.batch_size
    waiting = None
    for start in range(numbers.start, numbers.stop, size):
        some = list(readers.map(lambda number: _or_error(read, number), range(start, min(start + size, numbers.stop))))
        views = [view for each in some if isinstance(each, Decoded) for image in each.images for view in image]
        batches = [views[n : n + size] for n in range(0, len(views), size)]
        encoded = [(encode(batch), len(batch)) for batch in batches]
        if waiting:
            yield from _joined(*waiting)
        waiting = some, encoded
    if waiting:
        yield from _joined(*waiting)


def _joined(some: Sequence[Decoded | DataError], encoded: Sequence[tuple[Any, int]]) -> Iterator[Prepared | DataError]:
    features = itertools.chain.from_iterable(np.asarray(batch)[:count] for batch, count in encoded)
    for each in some:
        if isinstance(each, DataError):
            yield each
        else:
            of_images = [np.stack(list(itertools.islice(features, len(image)))).tobytes() for image in each.images]
            yield Prepared(each.sample, each.encoded, of_images)


def _or_error(read: Callable[[int], T], number: int) -> T | DataError:
    try:
        return read(number)
    except DataError as error:
        return error


def shrunk(image: Image.Image, data: bytes, size: int, mode: str) -> bytes:
    """An image's file made smaller, so that the side which `mode` brings to `size` pixels has them already.

    A file that is small enough comes back as it is. A JPEG stays one (quality 95, full colour), others become PNG.

    Args:
      image: the decoded file, upright.
      data: the file.
      size: pixels of the longer side (`pad`), the shorter one (`square`) or both (`resize`).
      mode: `model.vision.image_mode`.
    """
    sides = image.size
    target = {"pad": max, "square": min}.get(mode)
    small = tuple(max(1, round(side * size / target(sides))) for side in sides) if target else (size, size)
    if any(new >= old for new, old in zip(small, sides, strict=True)):
        return data
    stream = io.BytesIO()
    jpeg = data.startswith(b"\xff\xd8")
    options = {"format": "JPEG", "quality": 95, "subsampling": 0} if jpeg else {"format": "PNG"}
    image.resize((small[0], small[1]), resample=Image.Resampling.BICUBIC).save(stream, **options)
    return stream.getvalue()
