"""Random batches of any layout: several images a row, anywhere in the text, padding on either side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from saisa_jax.batch import Batch, empty_batch
from saisa_jax.config import ModelConfig

IMAGE = -1  # in a layout: an image stands here


def random_layout(rng: np.random.Generator, text: int, images: int, vocab_size: int) -> list[int]:
    """`text` random tokens with `images` images among them, none at the end."""
    layout = rng.integers(3, vocab_size, text).tolist()
    for _ in range(images):
        layout.insert(int(rng.integers(0, len(layout))), IMAGE)
    return layout


def make_batch(
    config: ModelConfig,
    layouts: Sequence[Sequence[int]],
    *,
    text_length: int | None = None,
    max_images: int | None = None,
    padding: str = "right",
    seed: int = 0,
) -> Batch:
    """One row for each layout: tokens, with IMAGE where an image stands. Row i's images depend on seed and i alone."""
    texts = [[token for token in layout if token != IMAGE] for layout in layouts]
    counts = [sum(token == IMAGE for token in layout) for layout in layouts]
    length = max(map(len, texts)) if text_length is None else text_length
    slots = max(counts) if max_images is None else max_images
    batch = empty_batch(len(layouts), length, slots, config.vision.image_size)
    for row, (layout, text) in enumerate(zip(layouts, texts, strict=True)):
        rng = np.random.default_rng([seed, row])
        where = slice(0, len(text)) if padding == "right" else slice(length - len(text), length)
        position, positions, starts = 0, [], []
        for token in layout:
            (starts if token == IMAGE else positions).append(position)
            position += config.vision.num_patches if token == IMAGE else 1
        batch["tokens"][row, where] = text
        batch["targets"][row, where] = [*text[1:], 0]
        batch["loss_weights"][row, where] = [*[1.0] * (len(text) - 1), 0.0]
        batch["positions"][row, where] = positions
        batch["segment_ids"][row, where] = 1
        batch["image_positions"][row, : len(starts)] = starts
        batch["image_segment_ids"][row, : len(starts)] = 1
        size = config.vision.image_size
        batch["images"][row, : len(starts)] = rng.integers(0, 256, (len(starts), size, size, 3))
    return batch
