"""Distillation's part of the configuration: a trained LLaVA teaches what is made of it (docs/family.md)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from saisa_jax.config.checks import check, choice, positive
from saisa_jax.config.model import LoraConfig, ModelConfig

STARTS = ("ridge", "copy")
FITTED = ("mlp", "low_rank")  # kinds of projectors that `ridge` can fit


@dataclass(frozen=True)
class DistillConfig:
    """Stage 2 by a teacher. The student has its decoder, its vision encoder and, to begin with, its connector."""

    teacher: str = ""  # a finished model of alignment llava; "": none, and nothing else here counts
    weight: float = 1.0  # of KL(teacher || student) at the answers' tokens, beside cross-entropy, whose weight is 1
    temperature: float = 1.0  # softens both distributions; KL is multiplied by its square
    # Each layer's projector at first: fitted in closed form to the teacher's visual tokens at that layer, or a copy of
    # the teacher's connector. With `init_from`, which names a student, neither.
    start: str = "ridge"
    batches: int = 32  # of the stage, that are read for the fit
    # How much a fit is held near the connector, as a share of the mean square of what is fitted on.
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        check(self.weight >= 0, f"distill.weight={self.weight} must not be negative")
        choice("distill.start", self.start, STARTS)
        for name in ("temperature", "batches", "ridge"):
            positive(f"distill.{name}", getattr(self, name))


@dataclass(frozen=True)
class Teacher:
    """The model that teaches, and how.

    Attributes:
      model: of the teacher.
      weight: of KL.
      temperature: of both distributions.
      within: the student's frozen parameters are the teacher's own, which therefore has no copy of them.
    """

    model: ModelConfig
    weight: float
    temperature: float
    within: bool


def teacher_of(distill: DistillConfig, student: ModelConfig, init_from: str) -> Teacher | None:
    """The teacher of a student, as LLaVA with the same decoder and encoder; None: there is none."""
    if not distill.teacher:
        return None
    kind = "mlp" if student.projector.kind == "low_rank" else student.projector.kind
    model = dataclasses.replace(
        student,
        alignment="llava",
        visual_layers=None,
        frozen_prefix=False,
        remat_policy="none",  # nothing runs backward through it
        projector=dataclasses.replace(student.projector, kind=kind, sharing="shared"),
        lora=LoraConfig(),
    )
    return Teacher(model, distill.weight, distill.temperature, within=not init_from)


def check_distillation(
    distill: DistillConfig, student: ModelConfig, sharing: str, stages: tuple[str, ...], init_from: str
) -> None:
    """Raises ConfigError for a teacher whose student cannot be made, or cannot start as it is to."""
    if not distill.teacher:
        return
    check(
        stages == ("finetune",),
        f"distill.teacher is for stage 2, and stages={stages}: set stages=finetune",
    )
    check(
        student.alignment in ("saisa", "naavit"),
        f"distill.teacher teaches a student of model.alignment=saisa or naavit, not {student.alignment!r}",
    )
    if distill.start == "copy" or init_from:
        return
    check(
        student.alignment == "saisa" and sharing == "per_layer",
        "distill.start=ridge fits a projector for each layer: set model.alignment=saisa, model.projector.sharing="
        "per_layer and finetune.sharing=per_layer, or distill.start=copy",
    )
    check(
        student.projector.kind in FITTED,
        f"distill.start=ridge fits model.projector.kind={' and '.join(FITTED)}, not {student.projector.kind!r}: set "
        "distill.start=copy",
    )
    check(
        student.projector.kind != "low_rank" or student.projector.rank > 1,
        "distill.start=ridge makes a direction of two of the parts of model.projector.rank: set it to 2 at least, or "
        "distill.start=copy",
    )
