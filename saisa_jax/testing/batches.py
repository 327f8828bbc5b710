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
    rows = [[layout] for layout in layouts]
    return make_packed_batch(config, rows, text_length=text_length, max_images=max_images, padding=padding, seed=seed)


def make_packed_batch(
    config: ModelConfig,
    rows: Sequence[Sequence[Sequence[int]]],
    *,
    text_length: int | None = None,
    max_images: int | None = None,
    padding: str = "right",
    seed: int = 0,
) -> Batch:
    """As `make_batch`, each row being a list of layouts: samples that share it. An empty list is a row of padding."""
    text_lengths = [sum(token != IMAGE for layout in row for token in layout) for row in rows]
    counts = [sum(token == IMAGE for layout in row for token in layout) for row in rows]
    length = max(text_lengths) if text_length is None else text_length
    slots = max(counts) if max_images is None else max_images
    size = config.vision.image_size
    batch = empty_batch(len(rows), length, slots, size)
    for i, layouts in enumerate(rows):
        at, slot = 0 if padding == "right" else length - text_lengths[i], 0
        for segment, layout in enumerate(layouts, start=1):
            text = [token for token in layout if token != IMAGE]
            position, positions, starts = 0, [], []
            for token in layout:
                (starts if token == IMAGE else positions).append(position)
                position += config.num_visual_tokens if token == IMAGE else 1
            where, at = slice(at, at + len(text)), at + len(text)
            batch["tokens"][i, where] = text
            batch["targets"][i, where] = [*text[1:], 0]
            batch["loss_weights"][i, where] = [*[1.0] * (len(text) - 1), 0.0]
            batch["positions"][i, where] = positions
            batch["segment_ids"][i, where] = segment
            where, slot = slice(slot, slot + len(starts)), slot + len(starts)
            batch["image_positions"][i, where] = starts
            batch["image_segment_ids"][i, where] = segment
        batch["images"][i, :slot] = np.random.default_rng([seed, i]).integers(0, 256, (slot, size, size, 3))
    return batch
