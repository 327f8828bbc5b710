"""Sources of samples, by name. A new one is a function of (task, split) and a row in `SOURCES`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from saisa_jax.data import easy_vqa
from saisa_jax.data.sample import DataError, Sample

SOURCES: dict[str, Callable[[str, str], Sequence[Sample]]] = {
    "easy_vqa": easy_vqa.samples,
}


def make_source(name: str, task: str, split: str) -> Sequence[Sample]:
    """The samples of a source, by index.

    Args:
      name: a key of `SOURCES`.
      task: what the source makes of its data, for example `caption` or `vqa`.
      split: train, validation or test.

    Raises:
      DataError: unknown name, task or split, or data that is not there.
    """
    if name not in SOURCES:
        near = difflib.get_close_matches(str(name), SOURCES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(f"source={name!r} is not one of {', '.join(SOURCES)}{hint} (pretrain.source, finetune.source)")
    return SOURCES[name](task, split)
