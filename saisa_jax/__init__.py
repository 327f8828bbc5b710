"""SAISA (arXiv 2502.02458) in JAX: vision-language models whose visual tokens are keys and values only.

A finished model answers questions:

    import saisa_jax
    model = saisa_jax.load("runs/demo/finetune/model")
    model.generate("what color is the shape?", "picture.png", max_new_tokens=8)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saisa_jax.inference.model import VisionLanguageModel, load

__version__ = "0.1.0"
__all__ = ["VisionLanguageModel", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """`load` and the model on first use, so that `import saisa_jax.config` does not import all of JAX."""
    if name in ("VisionLanguageModel", "load"):
        from saisa_jax.inference import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
