"""The one batch type: what the data pipeline makes, and what training, evaluation, planning and the docs read.

Axes: B batch, T text tokens of a row, M image slots of a row.

A row is two streams. The text stream holds the tokens that are queries and are predicted. The visual stream holds
images, each of which becomes P visual tokens. Every token of either stream has a *position*, its place in the
interleaved sequence that LLaVA would have built, and a *segment*, the sample of the row that it belongs to (from 1; 0
is padding):

    "<s> <image> What is it ?"  with P = 4

    interleaved    <s>  v0  v1  v2  v3  What  is  it   ?
    position         0   1   2   3   4     5   6   7   8

    tokens           <s>  What  is  it   ?       positions        [0, 5, 6, 7, 8]     segment_ids        [1, 1, 1, 1, 1]
    images           [one]                       image_positions  [1]                 image_segment_ids  [1]

Several images, packed samples, text-only rows and padding on either side differ in positions and segments only.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

import ml_dtypes  # noqa: F401  # numpy learns of bfloat16 by it
import numpy as np

Array = Any  # numpy on the host, jax.Array on the device


class Batch(TypedDict):
    """Arrays of one batch, all of them with a leading axis B.

    `targets[b, t]` is the token that row b should predict at t (the next token of the same segment), and it counts with
    `loss_weights[b, t]`. The token right after an image has weight 0 under every alignment: under SAISA no text token
    precedes it that has attended to the image.
    """

    tokens: Array  # [B, T] int32
    targets: Array  # [B, T] int32
    loss_weights: Array  # [B, T] float32
    positions: Array  # [B, T] int32
    segment_ids: Array  # [B, T] int32, 0 = padding
    # [B, M, height, width, 3] uint8; or, where a frozen encoder has read them (`data.features`), its features
    # [B, M, P, C] in the model's dtype
    images: Array
    image_positions: Array  # [B, M] int32, position of an image's first visual token
    image_segment_ids: Array  # [B, M] int32, 0 = empty slot


class Slot(NamedTuple):
    """What an image slot of a batch holds."""

    shape: tuple[int, ...]
    dtype: Any

    @classmethod
    def of(cls, image: int | Slot) -> Slot:
        """A slot as it is; a number: an image of so many pixels a side."""
        return cls((image, image, 3), np.dtype(np.uint8)) if isinstance(image, int) else image


class HostBatch(NamedTuple):
    """A batch, and what the host knows of it; only the batch travels to the device."""

    batch: Batch
    sample_ids: tuple[tuple[str, ...], ...]  # of each row's segments 1, 2, ...
    dropped: tuple[str, ...]  # samples that could not be used, and why; their segments are empty
    # [rows, 3] int32: samples dropped, text tokens cut off the ends of samples that were too long, samples dropped that
    # `data.max_drop` limits
    lost: np.ndarray

    @property
    def num_samples(self) -> int:
        return sum(map(len, self.sample_ids)) - len(self.dropped)

    @property
    def cut_tokens(self) -> int:
        return int(self.lost[:, 1].sum())


def empty_batch(rows: int, text_length: int, max_images: int, image: int | Slot) -> Batch:
    """All padding: the shapes and dtypes of a batch, for abstract evaluation and for filling in.

    Args:
      rows: B.
      text_length: T.
      max_images: M.
      image: what an image slot holds: pixels of a side, or something else.
    """
    slot = Slot.of(image)
    text, slots = (rows, text_length), (rows, max_images)
    return Batch(
        tokens=np.zeros(text, np.int32),
        targets=np.zeros(text, np.int32),
        loss_weights=np.zeros(text, np.float32),
        positions=np.zeros(text, np.int32),
        segment_ids=np.zeros(text, np.int32),
        images=np.zeros((*slots, *slot.shape), slot.dtype),
        image_positions=np.zeros(slots, np.int32),
        image_segment_ids=np.zeros(slots, np.int32),
    )
