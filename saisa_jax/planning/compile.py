"""A stage's own train step, compiled for accelerators that are not here, with nothing but shapes."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saisa_jax import flops, parallel
from saisa_jax.config import Config, StageConfig
from saisa_jax.planning.packed import AttentionShares, attention_shares
from saisa_jax.planning.topologies import Topology, devices
from saisa_jax.planning.traffic import Traffic, traffic
from saisa_jax.training.setup import StageSetup, setup_stage
from saisa_jax.training.step import make_train_step

# Triton's products are tuned on the GPU itself; without one their compiler gives up on some shapes.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


@dataclass(frozen=True)
class Memory:
    """Bytes of one device: a chip, or half of one on tpu7x. What is donated is argument and output."""

    arguments: float
    outputs: float
    aliased: float
    temporaries: float
    peak: float


@dataclass(frozen=True)
class Program:
    """A compiled train step.

    Attributes:
      topology: what for.
      prepared: the stage.
      memory: None: the compiler found that it does not fit, and `refused` is what it said.
      work: FLOPs of a step.
      attention: how much of attention's pairs is legal and visited in rows as the stage packs them.
      traffic: per device and step, by kind of collective.
      seconds: that lowering and compiling took.
      loss_chunk: `training.loss_chunk`.
    """

    topology: Topology
    prepared: StageSetup
    memory: Memory | None
    refused: str
    work: flops.StepFlops
    attention: AttentionShares
    traffic: Mapping[str, Traffic]
    seconds: float
    loss_chunk: int = 0

    @property
    def settings(self) -> StageConfig:
        return self.prepared.settings

    @property
    def model_flops(self) -> float:
        """What a step has to compute, over all devices."""
        return self.work.useful(self.attention.legal)

    @property
    def hardware_flops(self) -> float:
        """What a step's program computes, over all devices: with what is computed again, and masked pairs."""
        return self.work.done(self.attention.visited)

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.memory.peak <= self.topology.chip.hbm / self.topology.chip.devices


def compile_stage(config: Config, stage: str, topology: Topology, steps: int) -> Program:
    """Compiles a stage's train step for a topology. A model of 7B takes a minute or two of one core for TPUs.

    Args:
      steps: of the stage, for its schedule.

    Raises:
      ConfigError: no compiler for the topology, or a mesh that does not suit it.
    """
    started = time.monotonic()
    prepared = setup_stage(config, stage, steps, devices(topology))
    settings = prepared.settings
    step: Any = make_train_step(
        prepared.model,
        prepared.optimizer,
        prepared.shardings,
        settings.accumulation,
        config.training.loss_chunk,
        prepared.teacher,
    )
    arguments = prepared.abstract_state(), prepared.abstract_batch()  # before the mesh, on which nothing can run
    with parallel.use(prepared.mesh, prepared.rules):
        traced = step.trace(*arguments)
        memory, refused, hlo = compiled(traced.lower(), GPU_OPTIONS if topology.on_gpu else {})
    return Program(
        topology=topology,
        prepared=prepared,
        memory=memory,
        refused=refused,
        work=flops.of_step(
            prepared.model,
            settings.groups,
            settings.batch_size,
            settings.text_length,
            settings.max_images,
            traced.jaxpr.jaxpr,
            prepared.teacher,
        ),
        attention=attention_shares(prepared.model, settings, config.data.packing, prepared.teacher),
        traffic=traffic(hlo, prepared.mesh.size) if hlo else {},
        seconds=time.monotonic() - started,
        loss_chunk=config.training.loss_chunk,
    )


def compiled(lowered: Any, options: dict[str, Any]) -> tuple[Memory | None, str, str]:
    """Memory of a lowered program, what the compiler said against it, and the program's text."""
    try:
        compiled = lowered.compile(options)
    except Exception as error:  # its type depends on the compiler's plugin
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = re.search(r"Used \S+ of \S+ hbm|.*exceeds available HBM.*", str(error))
        return None, said[0].strip() if said else str(error).splitlines()[0], ""
    m = compiled.memory_analysis()
    memory = Memory(
        arguments=m.argument_size_in_bytes,
        outputs=m.output_size_in_bytes,
        aliased=m.alias_size_in_bytes,
        temporaries=m.temp_size_in_bytes,
        # 0: this compiler does not tell. What is live at once is then everything.
        peak=m.peak_memory_in_bytes or m.argument_size_in_bytes + m.temp_size_in_bytes,
    )
    return memory, "", compiled.as_text()
