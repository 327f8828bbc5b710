"""The flags that say which devices hold a model, what it is computed in, and which other processes there are."""

from __future__ import annotations

import argparse
from typing import Any

from saisa_jax.cli.parser import layer_numbers
from saisa_jax.config import DTYPES, ConfigError, DistributedConfig, MeshConfig


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """What every program that asks a finished model can be told of it: `placed` reads it."""
    parser.add_argument("--dtype", choices=DTYPES, help="of the parameters, and what is computed in; by default as "
                        "they are stored")  # fmt: skip
    parser.add_argument("--mesh", metavar="data=N,fsdp=N,tensor=N", help="spreads the model over all devices, as "
                        "--config.mesh does in training: rows over data and fsdp, parameters over fsdp and tensor; "
                        "one N may be -1 (default: the first device; with --coordinator all along data)")  # fmt: skip
    parser.add_argument("--naavit_layers", type=layer_numbers, metavar="0,1,...", help="of LLaVA: in these layers no "
                        "visual token attends to anything")  # fmt: skip
    parser.add_argument("--frozen_visual_layers", type=layer_numbers, metavar="0,1,...", help="of LLaVA: these layers "
                        "leave visual tokens as they are (ShortV)")  # fmt: skip


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """`--coordinator`, `--num_processes` and `--process_id`, which are --config.distributed in training."""
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, where the same command is started on "
                        "several hosts; auto: as the TPU pod, Slurm or Open MPI says")  # fmt: skip
    parser.add_argument("--num_processes", type=int, help="with --coordinator=HOST:PORT")
    parser.add_argument("--process_id", type=int, help="of this process, from 0; with --coordinator=HOST:PORT")


def join(options: argparse.Namespace) -> None:
    """Joins the other processes; nothing of jax may have run before.

    Raises:
      ConfigError: the flags do not say who they are, or they cannot be reached.
    """
    from saisa_jax.training import processes  # imports jax, which --help does not need

    try:
        config = DistributedConfig(options.coordinator, options.num_processes, options.process_id)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--config.distributed.", "--").replace("distributed.", "--")) from error
    processes.start(config, flags="--")


def placed(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `inference.model.load` that the flags of `add_model_flags` say.

    Raises:
      ConfigError: a mesh that cannot be read.
    """
    switches = {
        name: getattr(options, name)
        for name in ("naavit_layers", "frozen_visual_layers")
        if getattr(options, name) is not None
    }
    return {"dtype": options.dtype, "mesh": mesh_of(options), "switches": switches}


def mesh_of(options: argparse.Namespace) -> MeshConfig | None:
    """What `--mesh` says.

    Raises:
      ConfigError: it cannot be read.
    """
    if options.mesh is not None:
        return MeshConfig.parse(options.mesh)
    return MeshConfig() if getattr(options, "coordinator", None) else None
