"""What `data inspect` says of a batch, and draws of it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from saisa_jax.__main__ import main
from saisa_jax.batch import HostBatch, empty_batch
from saisa_jax.cli import data_inspect as inspect
from saisa_jax.config import ConfigError
from saisa_jax.data.sample import Turn
from saisa_jax.data.text.conversation import encode
from saisa_jax.testing import tokenizers

P = 4
TINY = "--config=saisa_jax/testing/configs.py"
SAMPLES = {
    "a/0": (Turn("user", "is <image> red <image>?"), Turn("assistant", "no")),
    "a/1": (Turn("user", "is it blue?"), Turn("assistant", "yes 🙂 日"), Turn("user", "red?"), Turn("assistant", "no")),
    "a/2": (),  # dropped when it was read
    "a/3": (Turn("user", "<image>\nwhat shape?"), Turn("assistant", "a circle")),
}
IDS = tuple(SAMPLES)


@pytest.fixture(scope="module")
def byte_level():
    return tokenizers.byte_level()


@pytest.fixture(scope="module")
def sentence_piece():
    return tokenizers.sentence_piece()


def packed(tokenizer, template: str = "vicuna_v1") -> HostBatch:
    """The samples in the second of two rows, with the colours red, green and blue in three of its four slots."""
    batch = empty_batch(2, 400, 4, 8)
    text, slot = 3, 0
    for segment, turns in enumerate(SAMPLES.values(), 1):
        if not turns:
            continue
        encoded = encode(turns, template, tokenizer, P, system_prompt="")
        place = slice(text, text := text + len(encoded.tokens))
        for name in ("tokens", "targets", "loss_weights", "positions"):
            batch[name][1, place] = getattr(encoded, name)
        batch["segment_ids"][1, place] = segment
        for position in encoded.image_positions:
            batch["images"][1, slot, ..., slot] = 255
            batch["image_positions"][1, slot], batch["image_segment_ids"][1, slot] = position, segment
            slot += 1
    return HostBatch(batch, ((), IDS), (), np.zeros((2, 2), np.int32))


def said(host: HostBatch, row: int, tokenizer) -> list[str]:
    return [inspect._marked(line) for line in inspect.describe_row(host, row, tokenizer, P)]


def test_a_packed_row_in_words(byte_level) -> None:
    host = packed(byte_level)
    first = int(host.batch["image_positions"][1, 0])
    title, *lines = said(host, 1, byte_level)
    used = (host.batch["segment_ids"][1] > 0).sum()
    assert title.startswith(f"\nrow 1: 4 segment(s); {used} of 400 text tokens ({used / 400:.0%}), ")
    assert title.endswith("of them learned; 3 of 4 image slots")
    assert lines[0:2] == [
        "segment 1: sample 'a/0'",
        f"<s>USER: is [image 1: 4 tokens at position {first}] red "
        f"[image 2: 4 tokens at position {host.batch['image_positions'][1, 1]}]? ASSISTANT:« no</s>»",
    ]
    assert lines[3] == "<s>USER: is it blue? ASSISTANT:« yes 🙂 日</s>»USER: red? ASSISTANT:« no</s>»"
    assert lines[4] == "segment 3: sample 'a/2': nothing"
    assert lines[6] == (
        f"<s>USER: [image 3: 4 tokens at position {host.batch['image_positions'][1, 2]}]\n"
        "what shape? ASSISTANT:« a circle</s>»"
    )
    assert len(lines) == 7
    assert said(host, 0, byte_level) == [
        "\nrow 0: 0 segment(s); 0 of 400 text tokens (0%), 0 of them learned; 0 of 4 image slots"
    ]


def test_words_of_a_tokenizer_whose_first_word_loses_its_space(sentence_piece) -> None:
    (line,) = said(packed(sentence_piece), 1, sentence_piece)[4:5]
    assert "is it blue? ASSISTANT:« yes" in line


def test_a_terminal_gets_colours(byte_level) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", soft_wrap=True, markup=False)
    for line in inspect.describe_row(packed(byte_level), 1, byte_level, P):
        console.print(line)
    out = console.file.getvalue()
    assert "\x1b[1;32m a circle</s>\x1b[0m" in out and "\x1b[1;35m[image 3" in out and "«" not in out


def test_the_contact_sheet(byte_level) -> None:
    sheet = np.asarray(inspect.contact_sheet(packed(byte_level), [1]))
    step = inspect.TILE + inspect.GAP
    assert sheet.shape == (2 * inspect.GAP + inspect.LABEL + inspect.TILE, inspect.GAP + 4 * step, 3)
    row = sheet[inspect.GAP + inspect.LABEL + inspect.TILE // 2]
    colours = [row[inspect.GAP + slot * step + inspect.TILE // 2].tolist() for slot in range(4)]
    assert colours == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]  # the last slot is empty
    for slot in range(4):  # and has words above it
        label = sheet[inspect.GAP : inspect.GAP + inspect.LABEL - 2, inspect.GAP + slot * step :][:, : inspect.TILE]
        assert (label < 128).any()


PACKED = """
import dataclasses
from saisa_jax.config import to_config_dict
from saisa_jax.testing.configs import tiny_config

def get_config():
    config = tiny_config()
    data = dataclasses.replace(config.data, packing=True, turns_per_sample=None)
    stage = dataclasses.replace(config.pretrain, text_length=24, max_images=3)
    return to_config_dict(dataclasses.replace(config, data=data, pretrain=stage))
"""


@pytest.mark.parametrize(
    ("options", "rows", "tokens"),
    [
        (["--limit=2"], 2, 64),
        (["--stage=pretrain", "--split=validation", "--limit=1", "--config.pretrain.batch_size=4"], 1, 16),
        (["--stage=pretrain", "--limit=3"], 3, 24),
    ],
)
def test_the_command(tmp_path, capsys, options: list[str], rows: int, tokens: int) -> None:
    recipe, out = tmp_path / "recipe.py", tmp_path / "sheet.png"
    recipe.write_text(PACKED)
    packing = tokens == 24
    assert inspect.main([f"--config={recipe}" if packing else TINY, f"--output={out}", *options]) == 0
    printed = capsys.readouterr().out
    assert f" of {tokens}, image fill" in printed and "«" in printed and "sample 'easy_vqa/" in printed
    assert "[image 1: 16 tokens at position " in printed
    assert printed.count("\nrow ") == rows
    assert ("segment 2: " in printed) == packing
    with Image.open(out) as sheet:
        assert sheet.size == (
            inspect.GAP + (3 if packing else 1) * (inspect.TILE + inspect.GAP),
            inspect.GAP + rows * (inspect.LABEL + inspect.TILE + inspect.GAP),
        )


def test_what_cannot_be_shown(capsys) -> None:
    with pytest.raises(ConfigError, match=r"--limit=0 must be at least 1"):
        inspect.main([TINY, "--limit=0"])
    with pytest.raises(ConfigError, match=r"there is no --config.finetune.batchsize; did you mean"):
        inspect.main([TINY, "--config.finetune.batchsize=3"])
    assert main(["data", "inspect", TINY, "--config.data.tokenizer=nowhere"]) == 2
    assert "data inspect: data.tokenizer='nowhere' is not a directory" in capsys.readouterr().err
