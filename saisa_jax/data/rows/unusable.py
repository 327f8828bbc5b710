"""Samples that cannot be used: what is said of them, and when they stop a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from absl import logging

from saisa_jax.config import DataConfig
from saisa_jax.data.sample import DataError

SHOWN = 10  # of them, in words


@dataclass
class Unusable:
    """Samples that cannot be used: how many, and the first of them in words."""

    number: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, *errors: DataError | str) -> None:
        self.number += len(errors)
        self.first += map(str, errors[: max(0, SHOWN - len(self.first))])

    def __str__(self) -> str:
        return "; ".join(self.first) + ("; ..." if self.number > len(self.first) else "")


def check_unusable(unusable: Unusable, total: int, data: DataConfig, where: str) -> None:
    """What becomes of samples that cannot be used, of `total`: an error that tells of all of them, or a warning.

    Raises:
      DataError: `data.on_error` is raise, or they are more than `data.max_drop` of all.
    """
    number = unusable.number
    if not number:
        return
    if data.on_error == "raise" and number == 1:
        raise DataError(unusable.first[0])
    seen = f"{where}: {number:,} of {total:,} samples cannot be used: {unusable}"
    if data.on_error == "raise":
        raise DataError(f"{seen}. Mend them, or leave them out with --config.data.on_error=drop")
    if number > data.max_drop * total:
        raise DataError(
            f"{seen}. That is {number / total:.1%}, more than --config.data.max_drop="
            f"{data.max_drop}: mend them, or raise it"
        )
    logging.warning("%s; they are left out", seen)
