"""A local step of ResNet-20 under our methods beside the bare PyTorch loop.

    mpirun -np 2 python benchmarks/steps.py

All draw the same batches from the same array; periods are longer than the run, so no round is timed. On GPUs, if
PyTorch sees any, with as many threads as it likes.
"""

from __future__ import annotations

import os

import torch
from interleave import interleaved, table

from hpc_grawa.cli.parsing import parse
from hpc_grawa.comm import connect
from hpc_grawa.data import ArraySplit, Data, Splits
from hpc_grawa.launch import local_device
from hpc_grawa.models import ResNet20
from hpc_grawa.training.worker import Worker

REPEATS, STEPS = 25, 4


class Noise(Data):
    """Random images in the shape of CIFAR-10."""

    def size(self) -> int:
        return 5000

    def load(self) -> Splits:
        images = torch.randint(0, 256, (self.size(), 3, 32, 32), dtype=torch.uint8)
        labels = torch.randint(0, 10, (self.size(),))
        split = ArraySplit(images, labels, [0.5] * 3, [0.25] * 3)
        return Splits(split, None, split)


def main() -> None:
    """Run on every rank; rank 0 prints."""
    device = local_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    comm = connect("mpi")
    words = (
        "--model ResNet20 --data steps.Noise --budget.steps 1000000 --method.period 1000000 --run.control_every 1000000"
    )

    def worker(method: str) -> Worker:
        return Worker(parse([f"--method={method}", *words.split()]), comm)

    workers = {method: worker(method) for method in ("LocalSGD", "LocalLGRAWA")}
    examples, sampler = workers["LocalSGD"].splits.train, workers["LocalSGD"].sampler
    model = ResNet20().to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4, nesterov=True)
    criterion = torch.nn.CrossEntropyLoss()
    done = 0

    def bare() -> None:
        nonlocal done
        for _ in range(STEPS):
            batch = examples.batch(sampler.indices(done), sampler.generator(done))
            if device.type == "cuda":
                batch = batch[0].pin_memory(), batch[1].pin_memory()
            inputs, targets = (t.to(device, non_blocking=True) for t in batch)
            optimizer.zero_grad()
            criterion(model(inputs), targets).backward()
            optimizer.step()
            done += 1
        settle()

    def steps(worker: Worker) -> None:
        for _ in range(STEPS):
            worker.step()
        settle()

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    ours = {method: lambda worker=worker: steps(worker) for method, worker in workers.items()}
    medians = interleaved({"bare PyTorch loop": bare, **ours}, REPEATS, comm.barrier)
    if comm.rank == 0:
        where = f"{os.cpu_count()} cores" if device.type == "cpu" else torch.cuda.get_device_name()
        title = f"{STEPS} local steps of ResNet-20, batch 128, {comm.size} ranks on {where}"
        print(table(title, medians, "bare PyTorch loop"), flush=True)
    comm.close()


if __name__ == "__main__":
    main()
