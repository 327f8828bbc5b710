"""What a run runs on: the mesh of its devices, and its processes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from saisa_jax.config.checks import ConfigError, check, positive


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; one of them may be -1 for "all the rest"."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    dcn: int = 1  # the outermost part of `data`: slices of TPUs that are connected by the data center network

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        check(sizes.count(-1) <= 1, f"mesh={sizes}: at most one axis may be -1")
        check(all(size == -1 or size > 0 for size in sizes), f"mesh={sizes}: sizes are positive, or -1")
        positive("mesh.dcn", self.dcn)
        check(
            self.data == -1 or self.data % self.dcn == 0,
            f"mesh.data={self.data} does not divide by mesh.dcn={self.dcn}, which is a part of it",
        )

    @classmethod
    def parse(cls, text: str) -> MeshConfig:
        """The mesh of "fsdp=4,tensor=2", as `--mesh` has it; `data` takes the rest unless another axis does.

        Raises:
          ConfigError: an axis that there is not, or a size that is none.
        """
        sizes: dict[str, int] = {}
        for part in filter(None, text.split(",")):
            name, _, size = part.strip().partition("=")
            if name not in ("data", "fsdp", "tensor", "dcn") or not re.fullmatch(r"-?\d+", size):
                raise ConfigError(
                    f"mesh={text!r}: {part!r} is none of data=N, fsdp=N, tensor=N and dcn=N; for example "
                    "mesh=data=2,fsdp=4, where one of them may be -1 for all the rest"
                )
            sizes[name] = int(size)
        return cls(**({"data": 1} if -1 in sizes.values() else {}) | sizes)


@dataclass(frozen=True)
class DistributedConfig:
    """The processes of a run: one on each host, all started with the same command.

    Attributes:
      coordinator: HOST:PORT of process 0; "auto": what the TPU pod, Slurm or Open MPI says; None: one process.
      num_processes: of the run; with HOST:PORT.
      process_id: of this one, from 0; with HOST:PORT.
      timeout: seconds to wait for the others to start.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout: int = 300

    def __post_init__(self) -> None:
        positive("distributed.timeout", self.timeout)
        given = self.num_processes is not None, self.process_id is not None
        if self.coordinator in (None, "auto"):
            check(
                not any(given),
                f"distributed.num_processes={self.num_processes}, process_id={self.process_id} and coordinator="
                f"{self.coordinator}: set --config.distributed.coordinator=HOST:PORT of process 0",
            )
            return
        check(
            bool(re.fullmatch(r".+:\d+", str(self.coordinator))),
            f"distributed.coordinator={self.coordinator!r} should be HOST:PORT of process 0, or auto",
        )
        port = int(str(self.coordinator).rpartition(":")[2])
        check(0 < port < 2**16, f"distributed.coordinator={self.coordinator}: there is no port {port}")
        check(
            all(given),
            f"distributed.coordinator={self.coordinator} needs --config.distributed.num_processes and .process_id",
        )
        check(
            0 <= (self.process_id or 0) < (self.num_processes or 0),
            f"distributed.process_id={self.process_id} is none of {self.num_processes} processes, which count from 0",
        )
