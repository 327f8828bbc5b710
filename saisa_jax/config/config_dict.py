"""The configuration as an `ml_collections.ConfigDict`, in and out."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from ml_collections import config_dict

from saisa_jax.config.checks import ConfigError, check
from saisa_jax.config.run import Config
from saisa_jax.config.training import STAGES
from saisa_jax.errors import nearest

T = TypeVar("T")


def to_config_dict(config: Any) -> config_dict.ConfigDict:
    """A dataclass as a locked ConfigDict, nested, in which optional fields accept their type or None."""
    return config_dict.ConfigDict(_to_plain(config, placeholders=True)).lock()


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain, JSON-ready dictionaries and lists."""
    return _to_plain(config, placeholders=False)


def _to_plain(value: Any, placeholders: bool) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value))
        out: dict[str, Any] = {}
        for f in dataclasses.fields(value):
            item = _to_plain(getattr(value, f.name), placeholders)
            optional = _optional_type(hints[f.name])
            if placeholders and optional is not None and item is None:
                item = config_dict.placeholder(typing.get_origin(optional) or optional)
            elif placeholders and optional is not None and not isinstance(item, dict):
                reference = config_dict.placeholder(type(item))
                reference.set(item)
                item = reference
            out[f.name] = item
        return out
    if isinstance(value, tuple | list):
        return tuple(_to_plain(item, placeholders=False) for item in value)
    return value


def from_config_dict(cls: type[T], config: Mapping[str, Any] | config_dict.ConfigDict, path: str = "") -> T:
    """Builds dataclass `cls` from a ConfigDict or dictionary; missing keys take the dataclass's defaults.

    Raises:
      ConfigError: a key that the dataclass does not have (with the nearest ones), a value of a wrong type, or a
        combination that cannot run.
    """
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in config:
        if key not in names:
            near = nearest(str(key), names, n=3)
            raise ConfigError(
                f"unknown config key {path}{key}; "
                + (f"did you mean {' or '.join(path + n for n in near)}?" if near else f"known: {', '.join(names)}")
            )
    kwargs = {key: _coerce(hints[key], config[key], f"{path}{key}") for key in config}
    try:
        return cls(**kwargs)
    except ConfigError as error:
        section = path.rstrip(".")
        raise error if str(error).startswith(section) else ConfigError(f"{section}: {error}") from None


def from_saved(raw: Mapping[str, Any]) -> Config:
    """The configuration that a run or a finished model has saved, perhaps by an earlier version.

    Raises:
      ConfigError: as `from_config_dict`.
    """
    return from_config_dict(Config, upgrade_saved(raw))


def upgrade_saved(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A saved configuration with the fields that it was written without, where a default would say something else."""
    raw = dict(raw)
    evaluation = raw.get("evaluation")
    if isinstance(evaluation, Mapping) and "task" in evaluation:  # it said easy_vqa, whatever a run was trained on
        kept = {name: value for name, value in evaluation.items() if name != "task"}
        raw["evaluation"] = {"tasks": (evaluation["task"],) if _reads(raw, evaluation["task"]) else (), **kept}
    model = raw.get("model")
    vision = model.get("vision") if isinstance(model, Mapping) else None
    if isinstance(model, Mapping) and isinstance(vision, Mapping) and "family" not in vision:
        raw["model"] = {**model, "vision": {**vision, "family": _family_by_switches(vision)}}
    return raw


def _reads(raw: Mapping[str, Any], source_format: str) -> bool:
    """Whether a stage of a saved configuration is trained on a source of that format."""
    stages = [raw[name] for name in STAGES if isinstance(raw.get(name), Mapping)]
    return any(source.get("format") == source_format for stage in stages for source in stage.get("sources", ()))


def _family_by_switches(vision: Mapping[str, Any]) -> str:
    """`model.vision.family` before there was one: it was told from what the encoder switches on."""
    if vision.get("kind", "vit") != "vit":
        return vision["kind"]
    return "dinov2" if vision.get("layer_scale") else "clip" if vision.get("pre_norm", True) else "siglip"


def nearest_fields(path: str) -> list[str]:
    """Fields of `Config` that a wrong dotted path may have meant: those of the same last name, else like-named ones."""
    fields: list[str] = []

    def collect(value: Any, prefix: str) -> None:
        for name, item in value.items():
            collect(item, f"{prefix}{name}.") if isinstance(item, dict) else fields.append(f"{prefix}{name}")

    collect(to_dict(Config()), "")
    same = [field for field in fields if field.split(".")[-1] == path.split(".")[-1]]
    return [] if path in fields else same or nearest(path, fields, n=3)


def _coerce(hint: Any, value: Any, path: str) -> Any:
    optional = _optional_type(hint)
    if optional is not None:
        return None if value is None else _coerce(optional, value, path)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        check(isinstance(value, Mapping | config_dict.ConfigDict), f"{path}={value!r} should be a section of fields")
        return from_config_dict(hint, value, path + ".")  # type: ignore[arg-type]
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str):  # `--config.stages=finetune`
            value = tuple(part.strip() for part in value.split(",") if part.strip())
        check(isinstance(value, tuple | list), f"{path}={value!r} should be a tuple")
        args = typing.get_args(hint)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_coerce(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
        check(len(value) == len(args), f"{path}={value!r} should have {len(args)} entries")
        return tuple(_coerce(arg, item, f"{path}[{i}]") for i, (arg, item) in enumerate(zip(args, value, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    check(
        isinstance(value, hint) and not (hint is int and isinstance(value, bool)),
        f"{path}={value!r} should be of type {hint.__name__}",
    )
    return value


def _optional_type(hint: Any) -> Any:
    """X for `X | None`, else None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        args = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        if len(args) == 1 and len(typing.get_args(hint)) == 2:
            return args[0]
    return None
