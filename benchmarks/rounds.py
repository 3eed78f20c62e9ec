"""One averaging round of a ResNet-50-sized model: ours, its bare parts, and what PyTorch offers.

    mpirun -np 4 python benchmarks/rounds.py [mpi | horovod | gloo]

LGRAWA's round is timed without its probe, which is a forward and backward pass like any other.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable

import torch
from interleave import interleaved, table
from torch import Tensor
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torchvision.models import resnet50

import hpc_grawa
from hpc_grawa.averaging.scores import Score
from hpc_grawa.comm import connect

REPEATS = 15


class GivenScores(Score):
    """Scores that cost nothing, one per layer."""

    def __init__(self, size: int, rank: int) -> None:
        self.size = size
        self._scores = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)) + 0.5

    def take(self) -> Tensor:
        return self._scores


def raw_allreduce(backend: str) -> Callable[[Tensor], object]:
    """The backend's own allreduce, as a program without this package would call it."""
    if backend == "mpi":
        from mpi4py import MPI

        return lambda x: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, x.numpy())
    if backend == "horovod":
        import horovod.torch as hvd

        return lambda x: hvd.allreduce_(x, name="raw", op=hvd.Sum)
    return torch.distributed.all_reduce


def main(backend: str) -> None:
    """Run on every rank; rank 0 prints."""
    torch.set_num_threads(1)
    comm = connect(backend)
    model = resnet50()
    vector = hpc_grawa.ParameterVector(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = hpc_grawa.LGRAWA(period=1).build(comm, vector, optimizer, probe=lambda: torch.zeros(()))
    (lgrawa,) = run.synchronizers
    lgrawa.score = GivenScores(len(vector.parameters), comm.rank)
    (local_sgd,) = hpc_grawa.LocalSGD(period=1).build(comm, vector, optimizer).synchronizers
    x, message = torch.randn(len(vector)), torch.empty(len(vector))
    raw = raw_allreduce(backend)

    def bare() -> None:
        torch.mul(x, 1 / comm.size, out=message)
        raw(message)
        x.lerp_(message, 0.5)

    reference = f"scaled copy + raw {backend} allreduce + lerp"
    ways: dict[str, Callable[[], object]] = {
        reference: bare,
        f"raw {backend} allreduce": lambda: raw(message),
        "LGRAWA round (161 layer weights)": lgrawa.round,
        "LocalSGD round": local_sgd.round,
    }
    if backend != "horovod":
        gloo = comm if backend == "gloo" else connect("gloo")
        other = resnet50()
        for p in other.parameters():
            p.grad = torch.zeros_like(p)  # the averager skips parameters without one
        warnings.simplefilter("ignore")  # it is deprecated, and advises against a period of 1
        averager = PeriodicModelAverager(period=1, warmup_steps=0)
        ways["PeriodicModelAverager on Gloo"] = lambda: averager.average_parameters(other.parameters())
        gloo.barrier()
    medians = interleaved(ways, REPEATS, comm.barrier)
    if comm.rank == 0:
        ranks = f"{comm.size} ranks on {os.cpu_count()} cores"
        print(
            table(f"one round, {len(vector):,} parameters, {ranks}, median of {REPEATS}", medians, reference),
            flush=True,
        )
    comm.close()


if __name__ == "__main__":
    main(*sys.argv[1:] or ["mpi"])
