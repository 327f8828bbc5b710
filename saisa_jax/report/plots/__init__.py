"""The figures, each as the bytes of a PNG file."""

from saisa_jax.report.plots.answers import accuracy_by_kind, confusion
from saisa_jax.report.plots.cost import (
    accuracy_against_prefill,
    accuracy_against_seconds,
    accuracy_against_training,
    alignment_like,
    cost_by_part,
    prefill_by_alignment,
)
from saisa_jax.report.plots.layers import layer_use
from saisa_jax.report.plots.learning import loss, smooth
from saisa_jax.report.plots.style import color

__all__ = [
    "accuracy_against_prefill",
    "accuracy_against_seconds",
    "accuracy_against_training",
    "accuracy_by_kind",
    "alignment_like",
    "color",
    "confusion",
    "cost_by_part",
    "layer_use",
    "loss",
    "prefill_by_alignment",
    "smooth",
]
