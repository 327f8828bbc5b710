"""Known sizes: decoders and vision encoders as published, and `make`, which puts two of them together.

They stand with their families, in `convert/families/`. A preset states what the weights are (shapes, rotary base,
epsilons) and what they expect (pixels, context). Everything else keeps the defaults of `ModelConfig`, and any field can
be overridden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from saisa_jax.config import ConfigError, ModelConfig, ProjectorConfig, VisionConfig
from saisa_jax.convert.families import DECODERS, ENCODERS
from saisa_jax.errors import did_you_mean

T = TypeVar("T")


class Presets(Mapping[str, T], Generic[T]):
    """What the families of `convert/families/` publish, by name; looked up when the first is asked for."""

    def __init__(self, presets_by_family: Callable[[], Iterable[Mapping[str, T]]]) -> None:
        self._presets_by_family = presets_by_family

    @functools.cached_property
    def _presets(self) -> dict[str, T]:
        return {name: preset for presets in self._presets_by_family() for name, preset in presets.items()}

    def __getitem__(self, name: str) -> T:
        return self._presets[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._presets)

    def __len__(self) -> int:
        return len(self._presets)


# Fields of ModelConfig. `max_length` is the context that the weights were trained for.
LLMS: Presets[Mapping[str, Any]] = Presets(lambda: (family.presets for family in DECODERS.values()))
VISIONS: Presets[VisionConfig] = Presets(lambda: (family.presets for family in ENCODERS.values()))


def make(llm: str, vision: str | VisionConfig, alignment: str = "saisa", **overrides: Any) -> ModelConfig:
    """A model of known parts.

    Args:
      llm: a name in LLMS.
      vision: a name in VISIONS, or a custom encoder (`dataclasses.replace(VISIONS[name], image_size=224)`).
      alignment: saisa | naavit | llava | flamingo. SAISA gets a projector for each layer, the others have one.
      **overrides: further fields of ModelConfig; they win over the preset's.

    Raises:
      ConfigError: an unknown name, with the nearest ones; a field that ModelConfig does not have; fields that do not
        fit together.
    """
    encoder = _find("vision preset", VISIONS, vision) if isinstance(vision, str) else vision
    fields = {
        "projector": ProjectorConfig(sharing="per_layer" if alignment == "saisa" else "shared"),
        **_find("LLM preset", LLMS, llm),
        **overrides,
    }
    known = ModelConfig.__dataclass_fields__
    for name in fields:
        if name not in known or name in ("vision", "alignment"):
            hint = did_you_mean(name, known, n=3, cutoff=0.4, otherwise=f"; known: {', '.join(known)}")
            raise ConfigError(f"make({llm!r}, ...) got {name!r}, which is no field to override{hint}")
    return ModelConfig(alignment=alignment, vision=encoder, **fields)


def _find(kind: str, table: Mapping[str, Any], name: str) -> Any:
    if name not in table:
        hint = did_you_mean(name, table, n=3, cutoff=0.4, otherwise=f"; known: {', '.join(table)}")
        raise ConfigError(f"unknown {kind} {name!r}{hint}")
    return table[name]
