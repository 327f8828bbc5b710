"""What a source of data hands out: samples made of turns and images."""

from __future__ import annotations

import os
from dataclasses import dataclass

from saisa_jax.command_line import UserError

USER = "user"
ASSISTANT = "assistant"

ImageSource = str | os.PathLike[str] | bytes  # a path, or an encoded file


class DataError(UserError, ValueError):
    """A sample, or a source of samples, that cannot be used; the message names the sample and what mends it."""

    def __init__(self, message: str, sample_id: str = "") -> None:
        super().__init__(f"sample {sample_id!r}: {message}" if sample_id else message)


@dataclass(frozen=True)
class Turn:
    """What one side says; `<image>` in the text marks where an image stands."""

    role: str  # user | assistant
    text: str


@dataclass(frozen=True)
class Sample:
    """A conversation about images."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[ImageSource, ...]
    # The turns are pairs of question and answer that do not refer to one another: the pipeline may reorder them and
    # leave some out.
    independent_turns: bool = False
