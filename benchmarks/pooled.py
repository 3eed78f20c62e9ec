"""What the other ranks keep of their speed when one is four times slower: pooled rounds beside lockstep.

    mpirun -np 4 python benchmarks/pooled.py

A step and a probe of the fast ranks sleep 20 ms each in their forward pass, those of the slow rank 80 ms, so the
number of cores does not matter; steps, messages and the counter are real. Speed is steps per second of the fast ranks,
as a share of what a rank alone makes.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

import hpc_grawa
from hpc_grawa.comm import Communicator, connect
from hpc_grawa.schedules import RunFacts

PERIOD, ROUNDS, SECONDS, SLOWER = 32, 8, 0.02, 4


class Slow(nn.Module):
    """Sleeps as long as its rank's forward and backward pass would take."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 2)
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        y: Tensor = self.linear(x)
        return y


def speed(comm: Communicator, method: hpc_grawa.Method) -> float:
    """Steps per second of this rank, as a share of a rank's alone."""
    model = Slow(SECONDS * (SLOWER if comm.rank == 0 else 1))
    vector = hpc_grawa.ParameterVector(model)
    optimizer = torch.optim.SGD(vector.parameters, 0.1)

    def loss() -> Tensor:
        return model(torch.randn(8, 10)).square().mean()

    facts = RunFacts(total_steps=PERIOD * ROUNDS)
    run = method.build(comm, vector, optimizer, loss, facts=facts)
    made = 0

    closure = run.closure(loss)

    def step() -> None:
        optimizer.step(closure)

    alone = time.perf_counter()
    for _ in range(PERIOD):
        step()
    alone = (time.perf_counter() - alone) / PERIOD
    comm.barrier()
    start = time.perf_counter()
    while facts.step < PERIOD * ROUNDS:
        if run.before_step():
            step()
            run.after_step()
            made += 1
    run.finish()
    return made * alone / (time.perf_counter() - start)


def main() -> None:
    """Run on every rank; rank 0 prints."""
    torch.set_num_threads(1)
    comm = connect("mpi")
    lines = [f"speed kept by {comm.size - 1} ranks beside one that is {SLOWER} times slower, period {PERIOD}"]
    for method in (hpc_grawa.LGRAWA, hpc_grawa.LocalLGRAWA):
        kept = []
        for rounds in ("pooled", "lockstep"):
            own = torch.tensor([speed(comm, method(period=PERIOD, rounds=rounds))])
            kept.append(comm.allgather(own, "evaluate").wait()[1:].mean().item())
        lines.append(f"  {method.__name__:12}  pooled {kept[0]:4.0%}   lockstep {kept[1]:4.0%}")
    if comm.rank == 0:
        print("\n".join(lines), flush=True)
    comm.close()


if __name__ == "__main__":
    main()
