"""One averaging round of a ResNet-50-sized model: ours, its bare parts, and what PyTorch offers.

    mpirun -np 4 python benchmarks/rounds.py

LGRAWA's round is timed without its probe, which is a forward and backward pass like any other.
"""

from __future__ import annotations

import os
import warnings

import torch
import torch.distributed as dist
from interleave import interleaved, table
from mpi4py import MPI
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torchvision.models import resnet50

import hpc_grawa
from hpc_grawa.comm import connect
from hpc_grawa.scores import Score

REPEATS = 15


class GivenScores(Score):
    """Scores that cost nothing, one per layer."""

    def __init__(self, size: int, rank: int) -> None:
        self.size = size
        self._scores = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)) + 0.5

    def take(self) -> torch.Tensor:
        return self._scores


def main() -> None:
    """Run on every rank; rank 0 prints."""
    torch.set_num_threads(1)
    comm = connect("mpi")
    world = MPI.COMM_WORLD
    model = resnet50()
    vector = hpc_grawa.ParameterVector(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = hpc_grawa.LGRAWA(period=1).build(comm, vector, optimizer, probe=lambda: torch.zeros(()))
    (lgrawa,) = run.synchronizers
    lgrawa.score = GivenScores(len(vector.parameters), comm.rank)
    (local_sgd,) = hpc_grawa.LocalSGD(period=1).build(comm, vector, optimizer).synchronizers

    x, message = torch.randn(len(vector)), torch.empty(len(vector))

    def bare() -> None:
        torch.mul(x, 1 / comm.size, out=message)
        world.Allreduce(MPI.IN_PLACE, message.numpy())
        x.lerp_(message, 0.5)

    def allreduce() -> None:
        world.Allreduce(MPI.IN_PLACE, message.numpy())

    os.environ.update(RANK=str(comm.rank), WORLD_SIZE=str(comm.size), MASTER_ADDR="127.0.0.1", MASTER_PORT="29577")
    dist.init_process_group("gloo")
    other = resnet50()
    for p in other.parameters():
        p.grad = torch.zeros_like(p)  # the averager skips parameters without one
    warnings.simplefilter("ignore")  # it is deprecated, and advises against a period of 1
    averager = PeriodicModelAverager(period=1, warmup_steps=0)

    medians = interleaved(
        {
            "scaled copy + raw MPI allreduce + lerp": bare,
            "raw MPI allreduce": allreduce,
            "LGRAWA round (161 layer weights)": lgrawa.round,
            "LocalSGD round": local_sgd.round,
            "PeriodicModelAverager on Gloo": lambda: averager.average_parameters(other.parameters()),
        },
        REPEATS,
        world.Barrier,
    )
    if comm.rank == 0:
        title = (
            f"one round, {len(vector):,} parameters, {comm.size} ranks on {os.cpu_count()} cores, median of {REPEATS}"
        )
        print(table(title, medians, "scaled copy + raw MPI allreduce + lerp"), flush=True)
    dist.destroy_process_group()
    comm.close()


if __name__ == "__main__":
    main()
