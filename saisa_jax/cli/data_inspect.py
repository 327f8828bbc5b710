"""`python -m saisa_jax data inspect --config=RECIPE`: rows as training sees them, in words and as pictures.

Of each row it prints how full it is, and of each segment (a sample of the row) the text. What is learned is green; on
what is no terminal it stands between « and ». An image stands in the text as [image 2: 576 tokens at position 35], its
pictures on a contact sheet. Settings are written --config.name=value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from saisa_jax.batch import Batch, HostBatch
from saisa_jax.cli.parser import Parser
from saisa_jax.config import STAGES, Config, ConfigError
from saisa_jax.data.pipeline import StageData
from saisa_jax.data.sample import DataError
from saisa_jax.data.text.tokenizer import load_tokenizer

LEARNED, IMAGE = "bold green", "bold magenta"
TILE, GAP, LABEL = 192, 12, 34  # pixels: a picture's side, the space around it, the height of the lines above it
FONT_SIZE = 13


def main(argv: Sequence[str]) -> int:
    """The verb `data inspect`.

    Raises:
      ConfigError, DataError: the recipe or the data cannot be used.
    """
    parser = Parser("data inspect", __doc__, recipe=True)
    parser.add_argument("--stage", choices=STAGES, default="finetune", help="default: finetune")
    parser.add_argument("--split", choices=("train", "validation"), default="train", help="default: train")
    parser.add_argument("--limit", type=int, default=3, help="rows to show (default 3)")
    parser.add_argument("--output", default="inspect.png", help="the contact sheet (default inspect.png)")
    options, config = parser.parse_recipe(argv)
    if options.limit < 1:
        raise ConfigError(f"--limit={options.limit} must be at least 1")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    tokenizer = load_tokenizer(config.data.tokenizer)
    host = first_batch(config, options.stage, tokenizer, options.split)
    console.print(_batch_line(host, f"{config.name}, {options.stage}, {options.split}"))
    for reason in host.dropped:
        console.print(f"dropped: {reason}")
    shown = range(min(options.limit, len(host.sample_ids)))
    for row in shown:
        for line in describe_row(host, row, tokenizer, config.model.num_visual_tokens):
            console.print(line if console.is_terminal else _marked(line))
    if config.data.features:
        console.print("\nThe rows hold features of pictures, and no pictures to show (data.features).")
    elif host.batch["images"].shape[1]:
        contact_sheet(host, shown).save(options.output, "PNG")
        console.print(f"\n{options.output} shows the pictures of these rows.")
    else:
        console.print(f"\nThe rows have no image slots: {options.stage}.max_images=0.")
    return 0


def first_batch(config: Config, stage: str, tokenizer: PreTrainedTokenizerFast, split: str) -> HostBatch:
    """The first batch of a stage, from the pipeline that trains (split "train") or the one that evaluates.

    Raises:
      DataError: a source or a sample that cannot be used, or an empty split.
    """
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=0, prefetch=1))  # same rows
    data = StageData(config, stage, tokenizer)
    if split == "train":
        batches = data.batches()
        try:
            return next(batches)
        finally:
            batches.close()
    held_out = data.held_out(1)
    if not held_out:
        raise DataError(f"{stage}.validation holds no samples")
    return held_out[0]


def describe_row(host: HostBatch, row: int, tokenizer: PreTrainedTokenizerFast, num_patches: int) -> Iterator[Text]:
    """A row in words: a line about how full it is, then of each segment its sample and its text.

    Args:
      row: which one, from 0.
      tokenizer: what the batch was made with.
      num_patches: P, visual tokens of an image.
    """
    batch, ids = host.batch, host.sample_ids[row]
    used, slots = batch["segment_ids"][row] > 0, batch["image_segment_ids"][row] > 0
    learned = int((batch["loss_weights"][row] > 0).sum())
    yield Text(
        f"\nrow {row}: {len(ids)} segment(s); {used.sum()} of {len(used)} text tokens ({used.mean():.0%}), "
        f"{learned} of them learned; {slots.sum()} of {len(slots)} image slots",
        style="bold",
    )
    for segment, sample_id in enumerate(ids, 1):
        text = segment_text(batch, row, segment, tokenizer, num_patches)
        yield Text(f"segment {segment}: sample {sample_id!r}" + ("" if text else ": nothing"), style="dim")
        if text:
            yield text


def segment_text(batch: Batch, row: int, segment: int, tokenizer: PreTrainedTokenizerFast, num_patches: int) -> Text:
    """What a segment of a row says, in the order of the positions; learned tokens and images have a style."""
    at = np.flatnonzero(batch["segment_ids"][row] == segment)
    tokens, positions = batch["tokens"][row, at].tolist(), batch["positions"][row, at]
    learned = [False, *(batch["loss_weights"][row, at[:-1]] > 0).tolist()]  # by the token before
    slots = np.flatnonzero(batch["image_segment_ids"][row] == segment)
    places = batch["image_positions"][row, slots]
    images: dict[int, str] = {}  # by the text token that they stand before
    for slot, place, index in zip(slots, places, np.searchsorted(positions, places).tolist(), strict=True):
        words = f"[image {slot + 1}: {num_patches} tokens at position {place}]"
        images[index] = images.get(index, "") + words
    text, start = Text(), 0
    for end in range(1, len(tokens) + 1):
        if end < len(tokens) and learned[end] == learned[start] and end not in images:
            continue
        text.append(images.get(start, ""), IMAGE)
        whole = _decoded(tokenizer, tokens[:end])  # of all so far: a decoder treats the first word otherwise
        text.append(whole[len(_decoded(tokenizer, tokens[:start])) :], LEARNED if learned[start] else None)
        start = end
    return text


def contact_sheet(host: HostBatch, rows: Sequence[int]) -> Image.Image:
    """The pictures of rows, a row of the batch in each row and a slot in each column, with words above each."""
    batch = host.batch
    slots = batch["images"].shape[1]
    font = ImageFont.load_default(FONT_SIZE)
    size = (GAP + slots * (TILE + GAP), GAP + len(rows) * (LABEL + TILE + GAP))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for line, row in enumerate(rows):
        for slot in range(slots):
            left, top = GAP + slot * (TILE + GAP), GAP + line * (LABEL + TILE + GAP)
            segment = int(batch["image_segment_ids"][row, slot])
            words = (f"row {row}, image {slot + 1}: empty", "")
            if segment:
                place = f"row {row}, image {slot + 1}, position {batch['image_positions'][row, slot]}"
                words = (place, f"{segment}: {host.sample_ids[row][segment - 1]}")
                sheet.paste(_tile(batch["images"][row, slot]), (left, top + LABEL))
            for number, text in enumerate(words):
                draw.text((left, top + number * (FONT_SIZE + 2)), _shortened(text, font), "black", font)
            draw.rectangle((left - 1, top + LABEL - 1, left + TILE, top + LABEL + TILE), outline="lightgray")
    return sheet


def _batch_line(host: HostBatch, name: str) -> Text:
    batch = host.batch
    rows, length = batch["tokens"].shape
    tokens, slots = batch["segment_ids"] > 0, batch["image_segment_ids"] > 0
    learned = (batch["loss_weights"] > 0).sum() / max(tokens.sum(), 1)
    images = f"image fill {slots.mean():.1%} of {slots.shape[1]} slot(s)" if slots.size else "no image slots"
    return Text(
        f"{name}: {rows} rows with {sum(map(len, host.sample_ids))} samples; token fill {tokens.mean():.1%} of "
        f"{length}, {images}; {learned:.1%} of the tokens are learned; {len(host.dropped)} "
        f"sample(s) dropped, {host.cut_tokens} token(s) cut"
    )


def _decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) if ids else ""


def _marked(line: Text) -> str:
    """Without colours: « and » around what is learned."""
    out = line.plain
    for span in reversed(line.spans):
        if span.style == LEARNED:
            out = f"{out[: span.start]}«{out[span.start : span.end]}»{out[span.end :]}"
    return out


def _tile(pixels: UInt8[np.ndarray, "size size 3"]) -> Image.Image:
    return Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BICUBIC)


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, or its beginning and its end, as wide as a picture at most."""
    keep, short = len(text), text
    while keep and font.getlength(short) > TILE:
        keep -= 1
        short = f"{text[: keep // 2]}…{text[len(text) - (keep - keep // 2) :]}"
    return short
