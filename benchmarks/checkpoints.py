"""Seconds to save and to read a ResNet-50's state, and what a checkpoint every 100 steps costs.

    mpirun -np 4 python benchmarks/checkpoints.py [FOLDER]     in a folder that all ranks see, /tmp by default

Every rank keeps parameters, momenta and a center, 0.3 GB. On a CPU the images are small, so that its steps are short.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from interleave import interleaved, table

from hpc_grawa.cli.parsing import parse
from hpc_grawa.comm import connect
from hpc_grawa.data import Data, Splits, TensorExamples
from hpc_grawa.launch import local_device
from hpc_grawa.runs.checkpoint import Checkpoints
from hpc_grawa.training.worker import Worker

ON_GPU = local_device().type == "cuda"
SIDE, BATCH, STEPS, REPEATS = (224, 64, 100, 1) if ON_GPU else (48, 4, 100, 2)


class Noise(Data):
    """Random images of 1000 classes."""

    def size(self) -> int:
        return 4 * BATCH

    def load(self) -> Splits:
        examples = TensorExamples(torch.randn(self.size(), 3, SIDE, SIDE), torch.randint(0, 1000, (self.size(),)))
        return Splits(examples, None, examples)


def main(where: str) -> None:
    """Run on every rank; rank 0 prints."""
    if not ON_GPU:
        torch.set_num_threads(1)
    comm = connect("mpi")
    words = f"--method LGRAWA --model ResNet50 --data checkpoints.Noise --data.batch_size {BATCH} --precision bf16"
    worker = Worker(parse([*words.split(), "--budget.steps=1000000"]), comm)
    made = tempfile.mkdtemp(dir=where, prefix="checkpoints-") if comm.rank == 0 else ""
    folder = Path(comm.gather_bytes(made.encode())[0].decode())
    checkpoints = Checkpoints(folder, comm)
    worker.run.control.written = checkpoints.written
    copying: list[float] = []
    writing: list[float] = []

    def steps(saves: bool) -> None:
        began = time.perf_counter()
        if saves:
            assert not checkpoints.save(worker.facts.step, worker.state_dict(), {})
            copying.append(time.perf_counter() - began)
        for _ in range(STEPS):
            worker.step()
            if checkpoints.step <= worker.run.control.all_written:
                assert not checkpoints.settle()
                writing.append(time.perf_counter() - began)
        assert not checkpoints.settle()
        if ON_GPU:
            torch.cuda.synchronize()

    steps(saves=False)  # there is a center then
    ways = {"without": lambda: steps(saves=False), "with one checkpoint": lambda: steps(saves=True)}
    medians = interleaved(ways, REPEATS, comm.barrier)
    began = time.perf_counter()
    assert not checkpoints.save(worker.facts.step, worker.state_dict(), {}) and not checkpoints.settle()
    saving = time.perf_counter() - began
    began = time.perf_counter()
    restored = checkpoints.load()
    assert restored is not None
    worker.load_state_dict(restored.state)
    reading = time.perf_counter() - began
    size = sum(file.stat().st_size for file in (folder / f"{restored.step:09d}").glob("*.pt"))
    if comm.rank == 0:
        device = torch.cuda.get_device_name() if ON_GPU else "CPU"
        print(f"{comm.size} ranks, ResNet-50, {size / 1e9:.2f} GB in all, {device}")
        print(f"  save and wait  {saving:6.2f} s\n  read           {reading:6.2f} s")
        print(f"  training stands still for {statistics.median(copying):.3f} s, the checkpoint is there ", end="")
        print(f"{statistics.median(writing):.1f} s later" if writing else "at the next one")
        print(table(f"{STEPS} steps, batch {BATCH}, {SIDE} x {SIDE}", medians, "without"), flush=True)
        shutil.rmtree(folder)
    comm.close()


if __name__ == "__main__":
    main(*sys.argv[1:] or ["/tmp"])
