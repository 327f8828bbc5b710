"""The teacher of a stage: a LLaVA, the student's decoder and encoder with one connector, that never changes.

Where the student was made of it, the student's frozen parameters are the teacher's, and are in memory once. What the
teacher has of its own (`TrainState.teacher`) is the rest: its connector, and what trains in the student.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from saisa_jax import parallel
from saisa_jax.checkpoints import load_model, read_account
from saisa_jax.config import Config, ConfigError, ModelConfig, Teacher
from saisa_jax.models.saisa import abstract_params
from saisa_jax.training.optimizer import flatten, unflatten
from saisa_jax.training.start import check_tokenizer, names_step
from saisa_jax.training.state import param_shardings

Params = Any

# Fields of a model in which student and teacher may differ: they change no result, or belong to the student.
_FREE = ("dtype", "param_dtype", "remat_policy", "scan_layers", "attention_impl", "end_token_ids", "max_length", "lora")


def abstract_own(teacher: Teacher, frozen: Params) -> Params:
    """What a teacher has beside the student's frozen parameters: shapes, in the dtype of activations."""
    shared = flatten(frozen) if teacher.within else {}
    params = flatten(abstract_params(teacher.model))
    return unflatten(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, teacher.model.dtype)
            for path, leaf in params.items()
            if path not in shared
        }
    )


def own_shardings(teacher: Teacher, frozen: Params, mesh: Mesh, rules: parallel.Rules) -> Params:
    """Where each of them lives."""
    places = flatten(param_shardings(teacher.model, mesh, rules))
    return unflatten({path: places[path] for path in flatten(abstract_own(teacher, frozen))})


def teacher_params(teacher: Teacher, own: Params, frozen: Params) -> Params:
    """All parameters of a teacher."""
    held: Mapping[str, Any] = {**flatten(frozen), **flatten(own)}
    return unflatten({path: held[path] for path in flatten(abstract_params(teacher.model))})


def load_own(config: Config, own: Params, tokenizer: Any) -> Params:
    """Reads what a teacher has of its own.

    Args:
      config: the run's.
      own: of `abstract_own`.
      tokenizer: the run's.

    Raises:
      ConfigError: the teacher has another tokenizer.
    """
    params, _, trained_with, _ = load_model(config.distill.teacher, abstract=own, partial=True)
    check_tokenizer(config, trained_with, tokenizer, config.distill.teacher)
    return params


def check_teacher(config: Config) -> None:
    """Raises ConfigError, CheckpointError if what `distill.teacher` names cannot teach the configured student."""
    path, teacher = config.distill.teacher, config.teacher
    if teacher is None:
        return
    flag = f"--config.distill.teacher={path}"
    if names_step(path):
        raise ConfigError(
            f"{flag} names a step of a run, and not a model; make one of it: python -m saisa_jax checkpoint export "
            f"--from={path} --to=MODEL"
        )
    document, account = read_account(path)
    leaves, model = document["leaves"], account.model
    if model.alignment != "llava":
        raise ConfigError(f"{flag} is a model of alignment={model.alignment}; a teacher is one of alignment=llava")
    if not any(name.startswith("vision/") for name in leaves):
        raise ConfigError(f"{flag} is an LLM without a vision encoder: it sees no pictures, and cannot teach to")
    if not any(name.startswith("visual_proj/") for name in leaves):
        raise ConfigError(f"{flag} has no projector: it sees no pictures, and cannot teach to")
    imported = document["metadata"].get("imported")
    if imported is not None and "projector" not in imported["parts"]:
        raise ConfigError(f"{flag} was imported without a trained projector: train it first, and then its student")
    if account.data.blind:
        raise ConfigError(f"{flag} was trained blind (data.blind): it sees no pictures, and cannot teach to")
    if lines := _differences(model, teacher.model):
        raise ConfigError(f"{flag} is another model than the student, --config.model: {'; '.join(lines)}")


def _differences(found: ModelConfig, expected: ModelConfig) -> list[str]:
    """Fields in which two models differ, as "embed_dim is 64, and not 32"."""

    def fields(model: ModelConfig) -> dict[str, Any]:
        plain = {name: value for name, value in dataclasses.asdict(model).items() if name not in _FREE}
        plain["projector"].pop("rank")
        plain["vision"].pop("precomputed")
        return flatten({**plain, "projector": {**plain["projector"], "hidden_dim": model.projector_dim}})

    ours, theirs = fields(expected), fields(found)
    return [
        f"{name.replace('/', '.')} is {theirs[name]}, and not {value}"
        for name, value in ours.items()
        if theirs[name] != value
    ]
