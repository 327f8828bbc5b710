"""What a data source returns: samples made of turns and images."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from saisa_jax.errors import UserError

USER = "user"
ASSISTANT = "assistant"


@runtime_checkable
class StoredImage(Protocol):
    """An image within another file. Its bytes are read when its pixels are needed, not with its sample."""

    @property
    def name(self) -> str:
        """Its path, unique to the image; also for messages."""
        ...

    def read(self) -> bytes:
        """The encoded file; DataError if it is not there or damaged."""
        ...


# A path, an encoded file, or a place of one; or an array [views, P, C]: what a frozen encoder made of it
# (`data/features.py`).
ImageSource = str | os.PathLike[str] | bytes | StoredImage | np.ndarray


class DataError(UserError, ValueError):
    """A sample, or a source of samples, that cannot be used; the message names the sample and how to fix it."""

    def __init__(self, message: str, sample_id: str = "") -> None:
        super().__init__(f"sample {sample_id!r}: {message}" if sample_id else message)
        self.sample_id, self.reason = sample_id, message


class EmptyAnswerError(DataError):
    """A sample with an answer of no words. Published sets hold some (LLaVA's 665k), so that they never stop a run."""


class TooLongError(DataError):
    """A sample of more tokens or positions than a row or the model has room for."""


class SourceChangedError(DataError):
    """A file of a source is not what it was when it was opened: its samples are others, and none of them is dropped."""


@dataclass(frozen=True)
class Turn:
    """One message; `<image>` in the text marks the place of an image."""

    role: str  # user | assistant
    text: str
    loss: bool = True  # False: an answer that later turns may read, and that is not learned


@dataclass(frozen=True)
class Sample:
    """A conversation about images."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[ImageSource, ...]
    # The turns are pairs of question and answer that do not refer to one another: the pipeline may reorder them and
    # leave some out.
    independent_turns: bool = False
    system: str | None = None  # the conversation's own system prompt; None: the run's, or the template's


@runtime_checkable
class Samples(Protocol):
    """A source's samples by number. They are read lazily; it is shared by threads, and small when pickled."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample:
        """Raises DataError if this one cannot be used."""
        ...
