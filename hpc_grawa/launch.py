"""What the launcher says about this process. The only place that reads a scheduler's or launcher's variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Launcher = Literal["horovodrun --gloo", "horovodrun", "mpirun", "srun", "torchrun"]


@dataclass(frozen=True)
class RankFacts:
    """A process's place in its job, before any communicator exists.

    Attributes:
        launcher: who started it, or None for a plain process.
        rank: among all processes of the job.
        size: number of processes in the job.
        local_rank: among those on this host.
        local_size: number of processes on this host.
    """

    launcher: Launcher | None = None
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


# The inner launcher first: under SLURM, mpirun starts one srun task per host, whose variables its ranks inherit.
_VARIABLES: tuple[tuple[Launcher, tuple[str, str, str, str]], ...] = (
    ("horovodrun --gloo", ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE")),
    (
        "mpirun",
        (
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        ),
    ),
    ("mpirun", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")),
    ("torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")),
    ("srun", ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")),
)


def rank_facts(environment: Mapping[str, str] = os.environ) -> RankFacts:
    """Read the launcher's variables.

    Example:
        >>> rank_facts({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"})
        RankFacts(launcher='mpirun', rank=3, size=4, local_rank=0, local_size=1)
    """
    for launcher, (rank, size, local_rank, local_size) in _VARIABLES:
        if rank in environment and size in environment:
            if launcher == "mpirun" and environment.get("_", "").endswith("horovodrun"):
                launcher = "horovodrun"
            return RankFacts(
                launcher,
                int(environment[rank]),
                int(environment[size]),
                int(environment.get(local_rank, 0)),
                int(environment.get(local_size, "1").split("(")[0].split(",")[0]),
            )
    return RankFacts()


def default_threads(facts: RankFacts) -> int | None:
    """Threads for this rank's share of the processors it may run on; None where OMP_NUM_THREADS decides."""
    if "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, len(os.sched_getaffinity(0)) // facts.local_size)
