"""Features in place of images: what a frozen vision encoder made of them, once (`data prepare --features`).

A prepared set that holds them says in its plan which encoder made them (`FeatureSpec`), and a stage that trains on them
(`data.features`) starts from a model with that encoder, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ml_dtypes  # noqa: F401  # numpy learns of bfloat16 by it
import numpy as np
from jaxtyping import Float

from saisa_jax.config import SourceConfig
from saisa_jax.data.sample import DataError, Samples


@dataclass(frozen=True)
class FeatureSpec:
    """What a set holds in place of each image: features of its views."""

    encoder: str  # a hash of its configuration and of the checksums of its weights
    shape: tuple[int, int]  # P, C of a view
    dtype: str

    @classmethod
    def of_plan(cls, plan: Mapping[str, Any]) -> FeatureSpec | None:
        """As a prepared set's plan says; None: it holds images."""
        said = plan.get("features")
        return said and cls(str(said["encoder"]), (int(said["shape"][0]), int(said["shape"][1])), str(said["dtype"]))

    def for_plan(self) -> dict[str, Any]:
        return asdict(self)

    def array(self, data: bytes) -> Float[np.ndarray, "views P C"]:
        """Features of an image's views; ValueError: the bytes are not as many."""
        return np.frombuffer(data, np.dtype(self.dtype)).reshape(-1, *self.shape)


def held_by(samples: Samples) -> FeatureSpec | None:
    """What a source's samples have in place of images; None: images."""
    return getattr(samples, "features", None)


def check_sources(opened: Sequence[Samples], sources: Sequence[SourceConfig], features: bool) -> None:
    """Raises DataError where a source holds images and the run reads features, or the other way round."""
    for samples, source in zip(opened, sources, strict=True):
        held = held_by(samples) is not None
        if held and not features:
            raise DataError(f"source {source} holds features in place of images: set --config.data.features=True")
        if features and not held:
            raise DataError(
                f"source {source} holds images, and --config.data.features=True reads what `data prepare --features` "
                "made of them: name such a set, or set --config.data.features=False"
            )


def check_encoder(held: FeatureSpec, wanted: FeatureSpec, source: str) -> None:
    """Raises DataError where a source's features are not what the run's own encoder would make."""
    if held == wanted:
        return
    seen = f"of {held.shape} {held.dtype}, and this run's are of {wanted.shape} {wanted.dtype}"
    if (held.shape, held.dtype) == (wanted.shape, wanted.dtype):
        seen = "of another encoder: its weights or --config.model.vision differ"
    raise DataError(
        f"source {source} holds features {seen}. Run `data prepare --features` with this run's --config.init_from and "
        "--config.model"
    )
