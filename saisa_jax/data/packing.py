"""Rows of a batch from conversations and images: one sample a row, padded on either side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from saisa_jax.batch import Batch, empty_batch
from saisa_jax.data.conversation import Encoded, check_length
from saisa_jax.data.sample import DataError


def pack_rows(
    encoded: Sequence[Encoded],
    images: Sequence[Sequence[UInt8[np.ndarray, "height width 3"]] | None],
    text_length: int,
    max_images: int,
    image_size: int,
    padding: str = "right",
    rows: int | None = None,
) -> Batch:
    """A batch with one conversation a row.

    Positions do not depend on the side of the padding. Image slots fill from the first.

    Args:
      encoded: one conversation for each row.
      images: each row's images, in the order of its placeholders; None leaves the row's slots empty (segment 0) while
        its text keeps the positions that it would have with them.
      text_length: T.
      max_images: M.
      image_size: height and width in pixels.
      padding: right or left, the side of the text stream that is filled up.
      rows: B, if more than there are conversations: the rest is all padding.

    Raises:
      DataError: a conversation does not fit, has more images than slots, or another number or size of images than it
        says.
    """
    if padding not in ("right", "left"):
        raise DataError(f"padding={padding!r} is neither right nor left")
    batch = empty_batch(len(encoded) if rows is None else rows, text_length, max_images, image_size)
    for row, (sample, pictures) in enumerate(zip(encoded, images, strict=True)):
        _check_fit(sample, pictures, text_length, max_images, image_size)
        count = len(sample.tokens)
        text = slice(0, count) if padding == "right" else slice(text_length - count, text_length)
        batch["tokens"][row, text] = sample.tokens
        batch["targets"][row, text] = sample.targets
        batch["loss_weights"][row, text] = sample.loss_weights
        batch["positions"][row, text] = sample.positions
        batch["segment_ids"][row, text] = 1
        batch["image_positions"][row, : len(sample.image_positions)] = sample.image_positions
        for slot, picture in enumerate(pictures or ()):
            batch["images"][row, slot] = picture
            batch["image_segment_ids"][row, slot] = 1
    return batch


def _check_fit(
    sample: Encoded,
    pictures: Sequence[UInt8[np.ndarray, "height width 3"]] | None,
    text_length: int,
    max_images: int,
    image_size: int,
) -> None:
    check_length(sample, text_length)
    expected = len(sample.image_positions)
    if expected > max_images:
        raise DataError(f"{expected} images in a row of {max_images} slots; raise data.max_images", sample.sample_id)
    if pictures is None:
        return
    if len(pictures) != expected:
        raise DataError(f"{len(pictures)} images for {expected} placeholder(s)", sample.sample_id)
    for picture in pictures:
        if picture.shape != (image_size, image_size, 3) or picture.dtype != np.uint8:
            raise DataError(
                f"an image of {picture.shape} {picture.dtype}, expected {(image_size, image_size, 3)} uint8 "
                "(model.vision.image_size)",
                sample.sample_id,
            )
