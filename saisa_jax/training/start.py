"""Where a stage's parameters come from."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh

from saisa_jax import parallel
from saisa_jax.checkpoints import is_model, load_model, local_model, read_account
from saisa_jax.checkpoints.checksums import describe, differences
from saisa_jax.config import (
    ADAPTER_PATTERN,
    CROSS_PATTERN,
    PROJECTOR_PATTERN,
    STAGES,
    Config,
    ConfigError,
    FlamingoConfig,
    ModelConfig,
)
from saisa_jax.data.pipeline import StageData
from saisa_jax.data.rows.counting import Effort
from saisa_jax.data.text.conversation import end_token_id
from saisa_jax.inference.features import feature_spec
from saisa_jax.models.projectors import PROJECTORS, base_of
from saisa_jax.models.saisa import abstract_params, init_params, share_to_per_layer
from saisa_jax.training.optimizer import assign_groups, flatten, unflatten
from saisa_jax.training.state import param_shardings

AT_STEP = re.compile(r"(?P<run>.+)@(?P<step>\d+)")  # of `init_from`: WORKDIR@N or WORKDIR/STAGE@N


class Start(NamedTuple):
    """A stage's first parameters: `make(argument)`.

    Function and argument are apart so that one jit can run the first on the second without making constants of them.
    """

    make: Callable[[Any], Any]
    argument: Any  # parameters, where they will be needed; or a random key
    source: str  # the model that they come from, or "random"


def starting_params(
    config: Config, stage: str, workdir: epath.Path, tokenizer: Any, mesh: Mesh, rules: parallel.Rules
) -> Start:
    """Where a stage's first parameters come from.

    In this order: the finished model of the stage before in the same workdir; `init_from`; random weights. (A run that
    has checkpoints of its own resumes from them; see `loop.py`.) Every device reads its own part of a model.

    Raises:
      ConfigError: weights whose shapes are not those of the configured model, all of them listed, or that were trained
        with another tokenizer.
    """
    source = start_source(config, stage, workdir)
    if source == "random":
        return Start(functools.partial(init_params, config.trained_model(stage)), jax.random.key(config.seed), "random")
    convert, stored = _conversion(config, stage, source)
    places = param_shardings(stored, mesh, rules)
    params, _, trained_with, _ = load_model(source, sharding=places)
    check_tokenizer(config, trained_with, tokenizer, source)
    if config.stage(stage).lora.rank:
        return Start(lambda params: _with_fresh(convert(params), config, stage, ADAPTER_PATTERN), params, source)
    return Start(convert, params, source)


def check_tokenizer(config: Config, trained_with: Any, tokenizer: Any, source: str) -> None:
    """Raises ConfigError if a model was trained with another tokenizer than the run's."""
    if trained_with is not None and trained_with.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"{source} was trained with another tokenizer than --config.data.tokenizer={config.data.tokenizer}; "
            f"set it to {source}/tokenizer"
        )


def start_source(config: Config, stage: str, workdir: epath.Path) -> str:
    """The model that a stage's first parameters come from, or "random"; whether it is there is not looked at."""
    previous = [local_model(workdir, name) for name in STAGES[: STAGES.index(stage)]]
    source = next((str(path) for path in reversed(previous) if is_model(path)), start_model(config, workdir))
    return source or "random"


def frozen_params(source: str, abstract: Any) -> Any:
    """The frozen parameters of a stage that resumes, whose others its checkpoint has: nothing else is read.

    Args:
      source: of `start_source`.
      abstract: the frozen parameters: shapes, dtypes and shardings.

    Returns:
      the parameters; None where they are not all in the source as they are, but made of it.
    """
    wanted = flatten(abstract)
    if not wanted:
        return abstract
    if source == "random" or not wanted.keys() <= read_account(source)[0]["leaves"].keys():
        return None
    return load_model(source, abstract=abstract, partial=True)[0]


def start_model(config: Config, workdir: epath.Path) -> str:
    """The finished model that `init_from` names, or the teacher; of a step of a run the copy of it in this workdir, and
    of a fitted student the fit."""
    made = names_step(config.init_from) or fits_start(config)
    return str(copy_of_start(workdir)) if made else config.init_from or config.distill.teacher


def fits_start(config: Config) -> bool:
    """Whether the first parameters are fitted to a teacher (`ridge.py`)."""
    return bool(config.distill.teacher) and not config.init_from and config.distill.start == "ridge"


def names_step(source: str) -> bool:
    """Whether it is WORKDIR@N or WORKDIR/STAGE@N, and not a model of such a name."""
    return AT_STEP.fullmatch(source) is not None and not is_model(source)


def copy_of_start(workdir: epath.Path) -> epath.Path:
    """Where the model lies that a run has made to start from (`model_of_step.save_start`, `ridge.save_fit`)."""
    return epath.Path(workdir) / "start"


def _conversion(config: Config, stage: str, source: str) -> tuple[Callable[[Any], Any], ModelConfig]:
    """From a finished model's parameters to the stage's: the function, and the model as it is stored.

    Raises:
      ConfigError: they do not fit.
    """
    model = config.model_for(stage)
    document, account = read_account(source)
    params = unflatten(
        {path: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"]) for path, leaf in document["leaves"].items()}
    )
    absent = [
        part for part, held in (("vision tower", "vision" in params), ("projector", _projects(params))) if not held
    ]
    if absent:
        raise ConfigError(
            f"{source} holds no {' and no '.join(absent)}, so that training cannot start from it; import the LLM "
            "together with an encoder: python -m saisa_jax convert import --llm=... --vision=... --to=..."
        )
    shared, sharing = "visual_proj" not in params["layers"], model.projector.sharing
    stored = dataclasses.replace(model.projector, sharing="shared" if shared else "per_layer")
    convert: Callable[[Any], Any] = lambda params: params  # noqa: E731
    without_cross = bool(model.cross_layers) and "cross_layers" not in params
    fresh = [CROSS_PATTERN] if without_cross else []
    if _has_untrained_other(document, account.model, model):
        stored = dataclasses.replace(account.model.projector, sharing="shared")
        fresh.append(PROJECTOR_PATTERN)
    elif model.per_layer_projectors and shared:
        convert = functools.partial(share_to_per_layer, config=model, seed=config.seed)
    elif not shared and sharing == "shared":
        raise ConfigError(
            f"{source} has a projector for each layer, and {stage}.sharing=shared wants one: "
            f"set --config.{stage}.sharing=per_layer"
        )
    elif base_of(model) and "visual_proj" not in params:
        raise ConfigError(
            f"{source} has a projector for each layer, and model.projector.kind={model.projector.kind} starts from one "
            "for all: name a model of stage 1 with --config.init_from, or set --config.model.projector.kind=mlp"
        )
    if fresh:
        convert = functools.partial(_with_fresh, config=config, stage=stage, pattern="|".join(fresh))
    lines = differences(describe(jax.eval_shape(convert, params)), describe(abstract_params(model)), dtypes=False)
    if lines:
        raise ConfigError(f"{source} does not fit --config.model: {'; '.join(lines)}")
    if without_cross:  # the parameters of any other alignment with one projector
        model = dataclasses.replace(model, alignment="naavit", flamingo=FlamingoConfig())
    return convert, dataclasses.replace(model, projector=stored)


def _has_untrained_other(document: Any, imported: ModelConfig, model: ModelConfig) -> bool:
    """Whether the projector is the random one of an import, and of another kind than the model's."""
    account = document["metadata"].get("imported")
    wanted = base_of(model) or PROJECTORS[model.projector.kind]
    untrained = account is not None and "projector" not in account["parts"]
    return untrained and PROJECTORS[imported.projector.kind] is not wanted


def _with_fresh(params: Any, config: Config, stage: str, pattern: str) -> Any:
    """The parameters with the stage's random ones in place of those whose paths match, or beside them."""
    fresh = flatten(init_params(config.trained_model(stage), jax.random.key(config.seed)))  # jit drops all the others
    kept = {path: leaf for path, leaf in flatten(params).items() if not re.fullmatch(pattern, path)}
    return unflatten({**kept, **{path: leaf for path, leaf in fresh.items() if re.fullmatch(pattern, path)}})


def _projects(params: Any) -> bool:
    return "visual_proj" in params or "visual_proj" in params.get("layers", {})


def check_stages(
    config: Config, tokenizer: Any, workdir: epath.Path, stopped: Callable[[], bool] = lambda: False
) -> dict[str, StageData]:
    """Finds what would stop a later stage before the first one trains: its data, template and groups.

    Args:
      stopped: asked several times a second while samples are counted, which the run's processes share.

    Returns:
      the data of each stage, counted.

    Raises:
      ConfigError, DataError: as the stage itself would.
      CountingStopped: it was asked to stop.
    """
    effort = Effort(jax.process_index(), jax.process_count(), stopped=stopped)
    data = {name: StageData(config, name, tokenizer, str(workdir / name), effort) for name in config.stages}
    for name in config.stages:
        settings = config.stage(name)
        end_token_id(settings.template, tokenizer)
        _ = data[name].steps
        params = abstract_params(config.trained_model(name))
        rows = assign_groups(params, settings.groups)
        _check_features(config, name, workdir, data[name], rows)
        adapted = [path.removesuffix("_lora_a") for path in rows if path.endswith("_lora_a")]
        training = [path for path in adapted if not settings.groups[rows[path]][1].frozen]
        if training:
            raise ConfigError(
                f"{name}.lora.rank={settings.lora.rank} adapts kernels that are frozen, and {name}.groups train "
                f"{', '.join(training)}; use groups=TRAIN_ADAPTERS, or --config.{name}.lora.rank=0"
            )
    return data


def _check_features(config: Config, stage: str, workdir: epath.Path, data: StageData, rows: Mapping[str, int]) -> None:
    """With `data.features`: the stage keeps the encoder frozen, and it is the one that made the features.

    Args:
      rows: of the stage's groups, by parameter (`assign_groups`).

    Raises:
      ConfigError, DataError: it does not, or is not.
    """
    if not config.data.features:
        return
    groups = config.stage(stage).groups
    trained = [path for path, row in rows.items() if path.startswith("vision/") and not groups[row][1].frozen]
    if trained:
        raise ConfigError(
            f"{stage}.groups train the vision encoder ({trained[0]} and {len(trained) - 1} more), and with "
            "--config.data.features=True it is not run: freeze r'vision/.*', or train on images"
        )
    # Whose encoder every stage keeps. A student is fitted later, with its teacher's.
    source = config.distill.teacher if fits_start(config) else start_model(config, workdir)
    if not source:
        raise ConfigError(
            "--config.data.features=True needs the encoder that made the features: name a model that holds it with "
            "--config.init_from"
        )
    data.check_features(feature_spec(config, source))


def check_projectors(config: Config, workdir: epath.Path) -> None:
    """Stage 2 alone does not start from random projectors, unless it is asked to.

    Raises:
      ConfigError: it would: there is no stage 1 in the workdir, and no trained one in `init_from`.
    """
    begun = (local_model(workdir, "pretrain"), local_model(workdir, "finetune"), workdir / "finetune" / "checkpoints")
    if config.stages[0] != "finetune" or config.allow_random_init or any(path.exists() for path in begun):
        return
    if names_step(config.init_from) or (config.distill.teacher and not config.init_from):
        return  # which was trained
    if config.init_from:
        document = read_account(config.init_from)[0]
        imported = document["metadata"].get("imported")
        crossed = not config.model.cross_layers or any(re.fullmatch(CROSS_PATTERN, path) for path in document["leaves"])
        if crossed and (imported is None or "projector" in imported["parts"]):
            return
        lacks = "was imported without a trained projector" if crossed else "holds no cross layers"
        seen = f"--config.init_from={config.init_from} {lacks}"
    else:
        seen = f"there is no {local_model(workdir, 'pretrain')} and no --config.init_from"
    what = "projectors or cross layers" if config.model.cross_layers else "projectors"
    raise ConfigError(
        f"stage 2 would start from random {what}: {seen}. Name a model of stage 1 with --config.init_from=WORKDIR/"
        "pretrain/model, train both stages (--config.stages=pretrain,finetune), or start so on purpose with "
        "--config.allow_random_init=True"
    )
