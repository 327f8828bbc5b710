"""Weights in, weights out: the one room that knows how others spell their tensors and configs."""

from saisa_jax.convert.exporter import export_params
from saisa_jax.convert.importer import import_model

__all__ = ["export_params", "import_model"]
