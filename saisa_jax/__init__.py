"""SAISA (arXiv 2502.02458) in JAX: vision-language models whose visual tokens are keys and values only.

A finished model answers questions:

    import saisa_jax
    model = saisa_jax.load("runs/demo/finetune/model")
    model.generate(["what color is the shape?"], [["picture.png"]], max_new_tokens=8)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saisa_jax.inference.model import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """`load` on first use, so that `import saisa_jax.config` does not import all of JAX."""
    if name == "load":
        from saisa_jax.inference.model import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
