"""A finished model of any step of a run: to ask, to evaluate, to export, or to start another run from.

A checkpoint of a run holds what trains; what is frozen is made as the run itself made it (`starting_params`), and has
to have the checksums that the checkpoint names.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from typing import Any

import jax
from absl import logging
from etils import epath

from saisa_jax import buckets, parallel
from saisa_jax.checkpoints import (
    CheckpointError,
    RunCheckpointer,
    checksums,
    committed_steps,
    copy_sidecar,
    is_model,
    local_model,
    save_model,
)
from saisa_jax.config import STAGES, Config, ConfigError, MeshConfig, from_saved
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.models.lora import merge_adapters
from saisa_jax.training.optimizer import merge
from saisa_jax.training.setup import setup_stage
from saisa_jax.training.start import AT_STEP, copy_of_start, names_step, starting_params
from saisa_jax.training.state import abstract_saved, check_frozen, create_state

_CHECKPOINT = re.compile(rf"(?P<workdir>.+)/(?P<stage>{'|'.join(STAGES)})/checkpoints/(?P<step>\d+)/?")


def save_model_of_step(checkpoint: str | os.PathLike[str], directory: str | os.PathLike[str]) -> int:
    """Writes the finished model of a step; adapters are merged into it. It is computed on one CPU device.

    Args:
      checkpoint: WORKDIR/STAGE/checkpoints/N, or WORKDIR@N, or WORKDIR/STAGE@N.
      directory: of the model; what lies there may be an older model.

    Returns:
      the number of its parameters.

    Raises:
      CheckpointError: no such step, or one that is damaged; the steps that there are are named.
      ConfigError: the recipe of the run cannot be read, or what it started from is not there any more.
    """
    workdir, stage, step = find_step(checkpoint)
    path = workdir / "config.json"
    try:
        config = from_saved(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}, the configuration of the run, cannot be read: {error}") from error
    (cpu,) = jax.local_devices(backend="cpu")[:1]
    with jax.default_device(cpu):
        tokenizer = load_tokenizer(config.data.tokenizer)
        params, source = _params(dataclasses.replace(config, mesh=MeshConfig()), stage, step, workdir, tokenizer, cpu)
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        metadata = {"stage": stage, "steps": step, "start": source, "seed": config.seed, "parameters": count}
        metadata |= {
            "alignment": config.model.alignment,
            "checkpoint": str(workdir / stage / "checkpoints" / str(step)),
        }
        save_model(directory, params, config, tokenizer, metadata, None if source == "random" else copy_sidecar(source))
    return count


def save_start(config: Config, workdir: epath.Path) -> None:
    """Makes of `init_from=WORKDIR@N` the model that this run starts from, in its own workdir, where it stays.

    Raises:
      ConfigError: several processes, of which each would have to do it.
      CheckpointError: as `save_model_of_step`.
    """
    start = copy_of_start(workdir)
    if not names_step(config.init_from) or is_model(start):
        return
    if any(is_model(local_model(workdir, stage)) for stage in STAGES):
        return  # later stages start from that one
    if jax.process_count() > 1:
        raise ConfigError(
            f"--config.init_from={config.init_from} is for one process; for several, make a model of it first: "
            f"python -m saisa_jax checkpoint export --from={config.init_from} --to=MODEL, then --config.init_from=MODEL"
        )
    save_model_of_step(config.init_from, start)
    logging.info("%s is the model of %s, from which this run starts", start, config.init_from)


def find_step(checkpoint: str | os.PathLike[str]) -> tuple[epath.Path, str, int]:
    """(workdir, stage, step) of WORKDIR/STAGE/checkpoints/N, WORKDIR/STAGE@N or WORKDIR@N.

    Raises:
      CheckpointError: another form, no such step, or one that both stages have.
    """
    name = os.fspath(checkpoint)
    form = "expected WORKDIR/STAGE/checkpoints/N, WORKDIR@N or WORKDIR/STAGE@N"
    if at := AT_STEP.fullmatch(name):
        given, number = at["run"].rstrip("/"), int(at["step"])
        parent, _, last = given.rpartition("/")
        workdir, stages = (parent or ".", (last,)) if last in STAGES else (given, STAGES)
    elif whole := _CHECKPOINT.fullmatch(name):
        workdir, stages, number = whole["workdir"], (whole["stage"],), int(whole["step"])
    else:
        raise CheckpointError(f"{name} is no step of a run: {form}")
    where = buckets.absolute(os.path.expanduser(workdir))
    found = {stage: committed_steps(where / stage / "checkpoints") for stage in stages}
    having = [stage for stage in stages if number in found[stage]]
    if len(having) > 1:
        raise CheckpointError(
            f"both stages have a step {number}: {' or '.join(f'{where}/{s}@{number}' for s in having)}"
        )
    if not having:
        seen = "; ".join(f"{stage}: {', '.join(map(str, steps))}" for stage, steps in found.items() if steps)
        raise CheckpointError(f"there is no step {number} in {where}; it has {seen or 'none'}")
    return where, having[0], number


def _params(config: Config, stage: str, step: int, workdir: epath.Path, tokenizer: Any, device: Any) -> tuple[Any, str]:
    """The plain model's parameters at a step, and the model that the run started from."""
    setup = setup_stage(config, stage, steps=1, devices=[device])  # of steps the schedule alone depends on the number
    start = starting_params(config, stage, workdir, tokenizer, setup.mesh, setup.rules)
    donate = start.source != "random"
    with (
        parallel.use(setup.mesh, setup.rules),
        RunCheckpointer(workdir / stage / "checkpoints", read_only=True) as checkpointer,
    ):
        groups = setup.settings.groups
        state = create_state(start.make, start.argument, groups, setup.optimizer, setup.shardings, donate=donate)
        frozen, abstract = state.frozen, abstract_saved(state)
        del state  # never two copies in memory
        saved, metadata = checkpointer.restore(abstract, None, step)
        check_frozen(metadata["frozen"], checksums(frozen), start.source, f"{workdir / stage}")
        params = merge(saved["trainable"], frozen)
        if setup.model.lora.rank:
            params = jax.jit(functools.partial(merge_adapters, config=setup.model.lora))(params)
    return params, start.source
