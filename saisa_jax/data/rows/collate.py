"""Rows of a batch from conversations and images: one or several samples a row, padded on either side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped

from saisa_jax.batch import Batch, Slot, empty_batch
from saisa_jax.data.sample import DataError
from saisa_jax.data.text.conversation import Encoded, check_length


@dataclass(frozen=True)
class Example:
    """A sample, ready for a row.

    `images`, the views of all its images or their features, stand in the order of its placeholders; None leaves the
    row's slots empty (segment 0) while its text keeps the positions that it would have with them.
    """

    encoded: Encoded
    images: Sequence[Shaped[np.ndarray, "*slot"]] | None


def pack_rows(
    rows: Sequence[Sequence[Example | None]],
    text_length: int,
    max_images: int,
    image: int | Slot,
    padding: str = "right",
    count: int | None = None,
) -> Batch:
    """A batch of rows; the samples of a row are its segments 1, 2, ...

    Positions restart for each sample and do not depend on the side of the padding. Image slots fill from the first.

    Args:
      rows: the samples of each row; None is a sample that could not be used, whose segment stays empty.
      text_length: T.
      max_images: M; 0: text alone, also of samples whose images are left out.
      image: what an image slot holds: pixels of a side, or something else.
      padding: right or left, the side of the text stream that is filled up.
      count: B, if more than there are rows: the rest is all padding.

    Raises:
      DataError: a row's samples do not fit, have more images than slots, or another number or size of images than they
        say.
    """
    if padding not in ("right", "left"):
        raise DataError(f"padding={padding!r} is neither right nor left")
    batch = empty_batch(len(rows) if count is None else count, text_length, max_images, image)
    for row, examples in enumerate(rows):
        start, slot = 0, 0
        if padding == "left":
            start = max(0, text_length - sum(len(example.encoded.tokens) for example in examples if example))
        for segment, example in enumerate(examples, start=1):
            if example is None:
                continue
            sample = example.encoded
            check_length(sample, text_length - start)
            if max_images or example.images is not None:
                _check_images(example, max_images - slot, Slot.of(image))
            text = slice(start, start := start + len(sample.tokens))
            batch["tokens"][row, text] = sample.tokens
            batch["targets"][row, text] = sample.targets
            batch["loss_weights"][row, text] = sample.loss_weights
            batch["positions"][row, text] = sample.positions
            batch["segment_ids"][row, text] = segment
            if not max_images:  # nor are there images
                continue
            slots = slice(slot, slot := slot + len(sample.image_positions))
            batch["image_positions"][row, slots] = sample.image_positions
            if example.images:
                batch["images"][row, slots] = np.stack(example.images)
                batch["image_segment_ids"][row, slots] = segment
    return batch


def _check_images(example: Example, slots_left: int, image: Slot) -> None:
    sample, pictures = example.encoded, example.images
    expected = len(sample.image_positions)
    if expected > slots_left:
        raise DataError(f"{expected} images in a row of {slots_left} slots; raise max_images", sample.sample_id)
    if pictures is None:
        return
    if len(pictures) != expected:
        raise DataError(f"{len(pictures)} images for {expected} image slot(s)", sample.sample_id)
    for picture in pictures:
        if (picture.shape, picture.dtype) != image:
            raise DataError(
                f"an image of {picture.shape} {picture.dtype}, expected {image.shape} {image.dtype} "
                "(model.vision.image_size; with data.features: its features)",
                sample.sample_id,
            )
