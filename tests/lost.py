"""A loop of a user's own in which rank 1 is lost: ``python lost.py BACKEND METHOD FAULT [TIMEOUT]``."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
from torch import nn

import hpc_grawa
from hpc_grawa.comm import connect
from hpc_grawa.launch import own_slot

backend, method, fault = sys.argv[1:4]
timeout = float(sys.argv[4]) if len(sys.argv) > 4 else 6.0
lost = own_slot().rank == 1


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


if lost and fault == "stopped before it starts":
    stop()
comm = connect(backend, comm_timeout=timeout)  # type: ignore[arg-type]
if lost and fault == "stopped before its first message":
    stop()
model = nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer = hpc_grawa.DistributedOptimizer(optimizer, model, getattr(hpc_grawa, method)(), comm=comm)
run = optimizer.run  # type: ignore[attr-defined]
for step in range(12):
    if lost and step == 5:
        if fault == "stopped":
            stop()
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "exits":
            sys.exit(0)
        if fault == "ends at once":
            os._exit(0)
        if fault == "returns early":
            break
        if fault == "skips":
            continue
        if fault == "counts twice":
            run.synchronizers or run.aggregator.finish()
            run.after_step(torch.zeros(()))
        if fault == "sleeps":
            time.sleep(1000)
        if fault == "pauses":
            time.sleep(5)
        if fault == "forks" and os.fork() == 0:
            lost = False  # and goes on beside its parent
        if fault == "forks a child that exits":
            child = os.fork()
            if not child:
                sys.exit(0)
            os.waitpid(child, 0)
    optimizer.zero_grad()
    model(torch.full((4, 2), comm.rank + 1.0)).square().mean().backward()
    optimizer.step()
if not (lost and fault == "returns early"):
    run.finish()
    comm.barrier()
print(f"rank {comm.rank} is through", flush=True)
